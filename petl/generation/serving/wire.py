"""Bodies of requests in the format of OpenAI's API.

Unknown fields are refused, as those that would change nothing here: an answer that ignores a
setting looks like one that obeys it.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from petl.data.conversations import IMAGE, Part, declared_tools, parsed_turn, text_of, with_parts
from petl.data.tasks import Message
from petl.errors import shown
from petl.generation.inference.calls import Function
from petl.generation.inference.grammar import JSON_OBJECT, bounded_schema
from petl.system.files.read import parse_json

# bounds of what one request may cost; assumptions
MAX_STOPS = 16
MAX_TOOLS = 128  # OpenAI's limit; also of the calls in a message
MAX_TOOLS_TEXT = 2**18  # characters of them all
MAX_MESSAGES = 2000
MAX_PROMPTS = 64
MAX_IMAGES = 16  # in one request
MAX_CHOICES = 64  # in one request, over all of its prompts
TOP_LOGPROBS = 20  # OpenAI's limit
MAX_ENTRIES = 2**20  # of logprobs in one reply

LONGEST = 2**20  # characters or tokens, which is a quarter of gate.BODY_BYTES
Text = Annotated[str, StringConstraints(max_length=LONGEST)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
# fail_fast: a list of a million wrong items is one error, not a million
Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1, max_length=LONGEST)]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Schema = Annotated[dict[str, object], AfterValidator(bounded_schema)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Strict(BaseModel):
    """A body whose fields are of exactly these types."""

    model_config = ConfigDict(strict=True, extra="forbid")  # strict: "1" is no integer

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: object) -> object:
        """Leave out fields that are null, which clients send for those that are not set."""
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class ImageUrl(Strict):
    """Where an image is: in the request itself."""

    url: Annotated[str, StringConstraints(max_length=2**25)]  # below gate.IMAGE_BODY_BYTES
    detail: Literal["auto"] | None = None  # the processor of the model decides


class ContentPart(Strict):
    """A part of a message's content: a text or an image."""

    type: Literal["text", "image_url"]
    text: Text | None = None
    image_url: ImageUrl | None = None

    # not two classes: errors of a union would name them
    @model_validator(mode="after")
    def with_content(self) -> "ContentPart":
        """Refuse a part that has something other than its type says."""
        has_text, has_image = self.text is not None, self.image_url is not None
        if (has_text, has_image) != (self.type == "text", self.type == "image_url"):
            raise ValueError(f"a part of type {self.type} has the field {self.type}, and no other")
        return self


def arguments_of(text: str) -> str:
    """Return the arguments of a call, an object as JSON text.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(parse_json(text or "{}"), dict):
        raise ValueError(f"the arguments of a call are {shown(text)}, not a JSON object")
    return text


class CalledFunction(Strict):
    """A function that an earlier answer has called."""

    name: Name
    arguments: Annotated[Text, AfterValidator(arguments_of)]


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: Annotated[str, StringConstraints(max_length=100)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Text | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None
    ) = None
    tool_calls: (
        Annotated[list[ToolCall], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)] | None
    ) = None
    tool_call_id: Annotated[str, StringConstraints(max_length=100)] | None = None
    name: Annotated[str, StringConstraints(max_length=100)] | None = None

    @model_validator(mode="after")
    def with_role(self) -> "ChatMessage":
        """Refuse fields that do not belong to a message of its role."""
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} has no tool_calls")
        if (self.tool_call_id or self.name) and self.role != "tool":
            raise ValueError(f"a message of the role {self.role} has no tool_call_id or name")
        if self.content is None and not self.tool_calls:
            raise ValueError(f"content is missing in a message of the role {self.role}")
        return self

    def turn(self) -> Message:
        """The message as it is encoded, see petl.data.conversations."""
        # templates know the older word
        role = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, list):
            calls = {"tool_calls": [call.model_dump() for call in self.tool_calls or ()]}
            named = {"tool_call_id": self.tool_call_id, "name": self.name}
            turn = {"role": role, "content": self.content or "", **calls, **named}
            return parsed_turn(turn, f"the turn of the {role}")
        parts: list[Part] = [
            {"type": IMAGE} if part.text is None else {"type": "text", "text": part.text}
            for part in self.content
        ]
        plain = {"role": role, "content": text_of(parts)}
        return with_parts(plain, parts) if self.images else plain

    @property
    def images(self) -> list[str]:
        """The URLs of its images."""
        parts = self.content if isinstance(self.content, list) else ()
        return [part.image_url.url for part in parts if part.image_url is not None]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class JsonSchema(Strict):
    """A schema that the JSON of an answer follows."""

    name: Name
    definition: Annotated[Schema, Field(alias="schema")]
    description: Text | None = None
    strict: bool | None = None  # the schema is followed either way


class AnswerFormat(Strict):
    """The format of answers."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def with_schema(self) -> "AnswerFormat":
        """Refuse a format without the schema that it names, and one with a schema it has not."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(
                f"the type is {self.type}: json_schema has the field json_schema, and no other has"
            )
        return self

    @property
    def schema_of_answer(self) -> dict[str, object] | None:
        """What the JSON of an answer follows; None: it is any text."""
        if self.json_schema is not None:
            return self.json_schema.definition
        return JSON_OBJECT if self.type == "json_object" else None


class Common(Strict):
    """Fields of both kinds of completions; None: as if absent."""

    model: Annotated[str, StringConstraints(max_length=1000)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Ratio | None = None
    # the next two are vLLM's, OpenAI's API has neither
    top_k: Annotated[int, Field(ge=0, le=10**6)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # by token id, as text: keys of JSON are texts
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # signed, 64 bits
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: (
        StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: AnswerFormat | None = None
    # they change no answer: labels of the caller's, and settings of OpenAI's own service
    user: object = None
    metadata: object = None
    store: object = None
    service_tier: object = None
    safety_identifier: object = None
    prompt_cache_key: object = None

    @model_validator(mode="after")
    def with_stream(self) -> "Common":
        """Refuse options of a stream without `stream`, as OpenAI does."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class DeclaredFunction(Strict):
    """A function that answers may call, with the JSON schema of its arguments."""

    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None  # required calls follow the schema either way


class Tool(Strict):
    """A function that answers may call."""

    type: Literal["function"]
    function: DeclaredFunction


class NamedFunction(Strict):
    """The name of a function."""

    name: Name


class ToolChoice(Strict):
    """Whether answers may call functions or have to, or the function that they have to call."""

    type: Literal["none", "auto", "required", "function"]
    function: NamedFunction | None = None

    @model_validator(mode="after")
    def with_function(self) -> "ToolChoice":
        """Refuse a function without its name, and a name without a function."""
        if (self.type == "function") != (self.function is not None):
            raise ValueError(
                f"the type is {self.type}: function has the field function, and no other has"
            )
        return self


def choice_of(value: object) -> object:
    """A choice by a word as the object that names a function is one."""
    return {"type": value} if isinstance(value, str) else value


class ChatRequest(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    ]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: (
        Annotated[list[Tool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)] | None
    ) = None
    # not a union with words: errors would name the class
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(choice_of)] = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def with_tools(self) -> "ChatRequest":
        """Refuse tools that are too long, have one name, or cannot be chosen."""
        size = len(self.model_dump_json(include={"tools"}))
        if size > MAX_TOOLS_TEXT:
            raise ValueError(f"tools have {size:,} characters; allowed are {MAX_TOOLS_TEXT:,}")
        names = [each.function.name for each in self.tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"tools has two functions with the name {twice!r}")
        if self.choice != "none" and self.tool_choice is not None and not names:
            raise ValueError(f"tool_choice={self.choice!r} needs tools")
        if self.called not in (None, *names):
            raise ValueError(f"tool_choice names {self.called!r}, which is none of the tools")
        kind = "text" if self.response_format is None else self.response_format.type
        if kind != "text" and self.active_tools:
            raise ValueError(
                f"tools and response_format={kind!r} exclude each other: leave out one, or set "
                "tool_choice='none'"
            )
        return self

    @property
    def choice(self) -> str:
        """Whether answers may call functions or have to."""
        return "auto" if self.tool_choice is None else self.tool_choice.type

    @property
    def called(self) -> str | None:
        """The function that the answer has to call; None: any or none."""
        named = None if self.tool_choice is None else self.tool_choice.function
        return None if named is None else named.name

    @property
    def must_call(self) -> bool:
        """True if an answer has to call a function."""
        return self.choice in ("required", "function")

    @property
    def active_tools(self) -> list[Tool]:
        """The tools that an answer may call."""
        return [] if self.choice == "none" else self.tools or []

    @property
    def functions(self) -> list[Function]:
        """The functions that an answer may call."""
        functions = [each.function for each in self.active_tools]
        return [Function(each.name, each.parameters) for each in functions]

    @property
    def turns(self) -> list[Message]:
        """The conversation, the tools before it."""
        tools = [each.model_dump(exclude_none=True) for each in self.active_tools]
        return [*declared_tools(tools), *(message.turn() for message in self.messages)]

    @model_validator(mode="after")
    def with_logprobs(self) -> "ChatRequest":
        """Refuse the number of likely tokens without `logprobs`, as OpenAI does."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_completion_tokens or self.max_tokens  # the newer name wins

    @property
    def reported(self) -> int | None:
        """Number of likely tokens to report; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None  # 0: the chosen token's only


class CompletionRequest(Common):
    """The body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    # OpenAI's other values of these three are not supported
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_tokens

    @property
    def reported(self) -> int | None:
        """Number of likely tokens to report; None: no probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, texts or token ids."""
        given: Any = self.prompt
        # a list of integers is one prompt; lists of texts or of such lists are several
        return given if isinstance(given, list) and not isinstance(given[0], int) else [given]
