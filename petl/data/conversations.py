"""Conversations in the forms in which files have them, as messages of one form.

A message has the texts `role` and `content`, as chat templates take them. What only some messages
have (`EXTRAS`, `weight` 0 for an answer without loss, `parts` of a content with images) is in
`more`, as JSON text: columns of rows in memory have one type, which calls of functions with
different arguments have not. The functions that a conversation may call are the content of a first
message with the role `TOOLS`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from petl.data.tasks import TOOLS, Message
from petl.data.validation import nested, passage, text
from petl.errors import shown
from petl.system.files.read import parse_json

# the words of OpenAI, ShareGPT and exports of chat programs
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response"), "tool"),
    "function_call": "assistant",
}
MEANINGS = ("user", "assistant", "system", "tool")
Part = dict[str, str]  # {"type": "text", "text": ...}, or {"type": "image", "source": ...}
IMAGE = "image"
EXTRAS = ("name", "tool_call_id", "reasoning_content")  # texts that some templates print


@dataclass(frozen=True)
class TurnKeys:
    """How the turns of a file are written.

    Attributes:
        role, content: the keys of a turn, of which the first that it has is read.
        roles: what the words of its roles mean; words that are not there, see `ROLES`.
    """

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, role: str | None, content: str | None, roles: Mapping[str, str] | None
    ) -> "TurnKeys":
        """Those of settings; None: the usual ones."""
        role_keys, content_keys = (
            (role,) if role else cls.role,
            (content,) if content else cls.content,
        )
        return cls(role_keys, content_keys, roles or {})

    def described(self) -> str:
        """What a turn has."""
        pairs = [f"{one} and {other}" for one, other in zip(self.role, self.content, strict=False)]
        return ", or ".join(pairs)


USUAL = TurnKeys()


def conversation(value: object, keys: TurnKeys = USUAL) -> list[Message]:
    """Parse a list of turns with role and content (OpenAI), or from and value (ShareGPT).

    Raises:
        ValueError: it is not such a list, or a turn has an unknown role, nothing, or anything but
            text and calls of functions.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"is {shown(value)}, not a list of turns with {keys.described()}")
    turns = enumerate(value, start=1)
    messages = [parsed_turn(turn, f"turn {number}", keys) for number, turn in turns]
    roles = list(dict.fromkeys(message["role"] for message in messages))
    # a role that means itself is one of the model's template
    others = [role for role in roles if role not in (*MEANINGS, *keys.roles.values())]
    if others:
        meant = ", ".join(f"{role}: ..." for role in others)
        raise ValueError(
            f"has the roles {', '.join(roles)}: name the meaning of {' and of '.join(others)}, "
            f"data.roles={{{meant}}}, each {', '.join(MEANINGS)}, or the word itself if the "
            "template of the model has it"
        )
    for number, message in enumerate(messages, start=1):
        # calls of functions, images and thoughts are in `more`
        said = message["content"].strip() or "more" in message
        if not said and message["role"] in ("user", "assistant"):
            raise ValueError(f"has nothing in turn {number}, of the {message['role']}")
    return messages


def parsed_turn(turn: object, place: str, keys: TurnKeys = USUAL) -> Message:
    """Parse one turn.

    Args:
        place: in the conversation, for messages.
    """
    # anything but an object has no role, which the message below says
    given = turn if isinstance(turn, dict) else {}
    role = first(given, *keys.role)
    content = first(given, *keys.content)
    # function_call: OpenAI's older name, a single call
    calls = given.get("tool_calls") or given.get("function_call")
    if not isinstance(role, str) or (content is None and not calls and given.keys() - keys.content):
        present = f"; its keys are {', '.join(map(str, given))}" if given else ""
        raise ValueError(
            f"has {shown(turn)} as {place}, not an object with {keys.described()}{present}: name "
            "them with data.role=KEY data.content=KEY"
        )
    if role == "function_call" and not calls:  # ShareGPT: the call is the turn's text
        content, calls = "", content
    extras: dict[str, object] = {
        key: given[key] for key in EXTRAS if isinstance(given.get(key), str) and given[key]
    }
    name = keys.roles.get(role) or ROLES.get(role.lower(), role)
    if name != "tool":
        extras.pop("name", None)  # of a person, which templates do not print
    if calls:
        extras["tool_calls"] = tool_calls(calls, place)
    # OpenAI's fine-tuning format: 0 leaves this answer out of the loss, 1 is the default
    weight = given.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(
            f"has weight {shown(weight)} in {place}, where 0 (an answer without loss) and 1 are "
            "possible"
        )
    if weight == 0:
        extras["weight"] = 0
    empty = content is None and bool(calls)  # a turn that only calls functions
    parts = content_parts("" if empty else content, place)
    if any(part["type"] == IMAGE for part in parts):
        extras["parts"] = parts
    more = {"more": json.dumps(extras)} if extras else {}
    return {"role": name, "content": text_of(parts), **more}


def first(given: Mapping[str, object], *keys: str) -> object:
    """The first value that is not None; tables fill in the keys of other rows with None."""
    values = (given[key] if key in given else nested(given, key) for key in keys)
    return next((value for value in values if value is not None), None)


def content_parts(value: object, place: str) -> list[Part]:
    """The content of a turn as parts: texts, and images with their source if it is there."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError(f"has {place} with content {shown(value)}, not text")
    parts: list[Part] = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image_url", IMAGE):
            parts.append({"type": IMAGE, **image_source(part, place)})
        else:
            raise ValueError(f"has a part of type {kind} in {place}; text and images are read")
    return parts


def image_source(part: Mapping[str, object], place: str) -> Part:
    """The source of an image part; empty if another column has it."""
    # OpenAI: {"image_url": {"url": ...}}; transformers: {"url": ...}, {"path": ...}, {"image": ...}
    given = first(part, "image_url", "url", "path", IMAGE)
    given = given.get("url") if isinstance(given, dict) else given
    if given is None:
        return {}
    if not isinstance(given, str):
        raise ValueError(f"has the image {shown(given)} in {place}, not a path or data URL")
    return {"source": given}


def text_of(parts: Sequence[Part]) -> str:
    """The texts of parts, without images."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def parts_of(message: Message) -> list[Part]:
    """The parts of a message's content."""
    more = json.loads(message.get("more") or "{}")
    return more.get("parts") or [{"type": "text", "text": message["content"]}]


def with_parts(message: Message, parts: list[Part]) -> Message:
    """The message with other parts."""
    more = {**json.loads(message.get("more") or "{}"), "parts": parts}
    return {**message, "content": text_of(parts), "more": json.dumps(more)}


def turn_with_image(messages: Sequence[Message]) -> int:
    """The number of the first turn with an image, from 1; 0 if there is none."""
    marked = (any(part["type"] == IMAGE for part in parts_of(message)) for message in messages)
    return next((number for number, has_one in enumerate(marked, start=1) if has_one), 0)


def tool_calls(value: object, place: str) -> list[dict[str, object]]:
    """Calls of functions as chat templates take them: with arguments as an object, not as text."""
    calls = from_json(value, f"a call in {place}")
    # one call may stand without a list
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise ValueError(f"has {shown(value)} as a call in {place}, not an object with name")
    return [parsed_call(call, place) for call in calls]


def parsed_call(call: object, place: str) -> dict[str, object]:
    """Parse one call, `{"function": {"name", "arguments"}}` or the inner object alone."""
    given = call if isinstance(call, dict) else {}
    inner = given.get("function") or given
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f"has {shown(call)} as a call in {place}, not an object with name")
    # OpenAI has arguments as JSON text, and null for none
    arguments = from_json(inner.get("arguments") or {}, f"the arguments of a call in {place}")
    own_id = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return {
        "type": "function",
        **own_id,
        "function": {"name": inner["name"], "arguments": arguments},
    }


def declared_tools(value: object) -> list[Message]:
    """The message that declares functions, a list or its JSON text; none if it is empty."""
    tools = from_json(value, "the functions") if value else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"is {shown(value)}, not a list of functions")
    # chat templates expect the wrapped form; data sets often have the inner object alone
    wrapped = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return [{"role": TOOLS, "content": json.dumps(wrapped)}] if tools else []


def from_json(value: object, what: str) -> object:
    """The value of JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"has {shown(value)} as {what}: {error}") from error


def side(value: object, role: str, keys: TurnKeys = USUAL) -> list[Message]:
    """One side of a pair: a text, which is a turn of `role`, or a list of turns."""
    if isinstance(value, list):
        return conversation(value, keys)
    return [{"role": role, "content": text(value)}]


def system_turn(value: object) -> list[Message]:
    """The turn of a column with system prompts; none where it is empty."""
    # tables have None where a row has no value
    content = passage(value if value is not None else "")
    return [{"role": "system", "content": content}] if content.strip() else []


def past_turns(value: object) -> list[Message]:
    """The turns of earlier questions and answers, a list of pairs."""
    pairs = value or []
    if not isinstance(pairs, list | tuple):
        raise ValueError(f"is {shown(value)}, not a list of questions with their answers")
    turns: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"has {shown(pair)}, not a question and its answer")
        turns += [*side(pair[0], "user"), *side(pair[1], "assistant")]
    return turns


def without_loss(messages: Sequence[Message]) -> list[Message]:
    """The messages, answers among them without loss."""
    return [
        {**m, "more": json.dumps({**json.loads(m.get("more", "{}")), "weight": 0})}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]


def without_last_answer(messages: list[Message]) -> list[Message]:
    """The messages up to the last question."""
    end = len(messages)
    # several at the end: an answer may be in parts, calls of functions among them
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
