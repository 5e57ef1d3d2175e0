"""Calls of functions in an answer: how a model's chat template writes them, and what they are.

A call is a JSON object with the name of the function and its arguments, between marks such as
`<tool_call>` (Hermes, Qwen), behind `[TOOL_CALLS]` (Mistral) or alone (Llama 3). Which one it is, a
call that the template renders shows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import uuid4

from petl.data.conversations import declared_tools, parsed_turn
from petl.data.tasks import Message
from petl.data.tasks.chat import ChatTokenizer, checked_template, name_of, render, unpacked
from petl.data.tasks.chat_template import within_deadline
from petl.errors import UnsupportedError
from petl.generation.inference.grammar import FORMAT, Vocabulary
from petl.generation.inference.sampling import possible_stop

MAX_CALLS = 16  # in one answer, where calls are required; assumption
NAME, ARGUMENTS = "probe", {"key": "value"}  # of the calls that are rendered
NOTHING: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}
BEFORE_CALL = " \n\t[,"  # characters that may be between a mark and a call
JSON = json.JSONDecoder()


class Function(NamedTuple):
    """A function that an answer may call, with the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, object] | None


@dataclass(frozen=True)
class Call:
    """A call of a function; its arguments are an object as JSON text."""

    name: str
    arguments: str
    # nine letters and digits: Mistral's template takes no other identity
    id: str = field(default_factory=lambda: uuid4().hex[:9])


@dataclass(frozen=True)
class CallForm:
    """How answers write calls.

    Attributes:
        begin, end: the texts before and behind the calls.
        between: that between two calls; None: an answer has one.
        key: of the arguments.
    """

    begin: str
    end: str
    between: str | None
    key: str

    @property
    def mark(self) -> str:
        """What each list of calls, or each call, begins with; empty: an answer is one call."""
        return self.begin.rstrip(" \n\t[")

    def grammar(self, functions: Sequence[Function], count: int, vocabulary: Vocabulary) -> str:
        """The grammar of an answer that calls at least one of the functions, in Lark.

        Args:
            count: calls at most.
        """
        others = 0 if self.between is None else min(count, MAX_CALLS) - 1
        more = f" ({vocabulary.literal(self.between or '')} call){{0,{others}}}" if others else ""
        rules = [
            f"start: {vocabulary.literal(self.begin)} call{more} {vocabulary.literal(self.end)}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
        ]
        for i, each in enumerate(functions):
            schema = {**(each.parameters or NOTHING), "x-guidance": FORMAT}
            start = f'{{"name": {json.dumps(each.name)}, "{self.key}": '
            rules.append(f'call_{i}: {json.dumps(start)} %json {json.dumps(schema)} "}}"')
        return "%llguidance {}\n" + "\n".join(rules) + "\n"


def call_form(tokenizer: ChatTokenizer, ends: Sequence[int]) -> CallForm:
    """Return how the chat template of a tokenizer writes calls.

    Args:
        ends: tokens at which an answer ends.

    Raises:
        InputError: the template does not render calls, or not as JSON objects with a name.
    """

    def probed(count: int) -> str:
        calls = [
            {"id": f"probe000{i}", "function": {"name": NAME, "arguments": ARGUMENTS}}
            for i in range(count)
        ]
        turns = [
            *declared_tools([{"name": NAME, "description": "", "parameters": NOTHING}]),
            {"role": "user", "content": "?"},
            parsed_turn({"role": "assistant", "content": "", "tool_calls": calls}, "the answer"),
        ]
        return _written(tokenizer, turns, ends)

    def form() -> CallForm | None:
        text = probed(1)
        starts = [i for i, character in enumerate(text) if character == "{"]
        for start in starts:
            value, stop = _decoded(text, start)
            if isinstance(value, dict) and value.get("name") == NAME:
                key = next((key for key, given in value.items() if given == ARGUMENTS), None)
                if key is not None:
                    begin, end = text[:start], text[stop:]
                    return CallForm(begin, end, _between(text[start:stop], begin, end), key)
        return None

    def _between(call: str, begin: str, end: str) -> str | None:
        try:
            both = probed(2)
        except ValueError:  # such as Llama 3's template, which takes one call a turn
            return None
        # the identity of a call may be part of it
        first, second = call, call.replace("probe0000", "probe0001")
        inner = both.removeprefix(begin + first).removesuffix(second + end)
        return inner if both == begin + first + inner + second + end else None

    found = within_deadline(form, name_of(tokenizer))
    if found is None:
        raise UnsupportedError(
            f"{name_of(tokenizer)} does not write calls of functions as JSON objects with a name, "
            "which are the ones that can be read: ask without tools, or take another model"
        )
    return found


def _written(tokenizer: ChatTokenizer, messages: list[Message], ends: Sequence[int]) -> str:
    """The text of the last turn, with the special tokens in it, as the model writes it."""
    chat = unpacked(messages)
    checked_template(tokenizer, chat)
    asked = render(tokenizer, chat.turns[:-1], **chat.options, add_generation_prompt=True)
    whole = render(tokenizer, chat.turns, **chat.options)
    prompt, ids = asked["input_ids"], whole["input_ids"]
    if ids[: len(prompt)] != prompt:
        return ""
    ids = ids[len(prompt) :]
    count = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:count]))


def _decoded(text: str, start: int) -> tuple[object, int]:
    """The JSON value that begins there, and where it ends; None: there is none."""
    try:
        return JSON.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


@dataclass(frozen=True)
class CallReader:
    """Reads the calls in answers.

    Attributes:
        names: of the functions that may be called.
        specials: the texts of special tokens, which are no part of an answer.
        most: calls of an answer at most.
    """

    form: CallForm
    names: Sequence[str]
    specials: Sequence[str]
    most: int | None = None

    def clean(self, text: str) -> str:
        """The text without special tokens, but for those of calls."""
        marks = f"{self.form.begin} {self.form.between} {self.form.end}"
        for word in self.specials:
            text = text if word in marks else text.replace(word, "")
        return text

    def read(self, text: str) -> tuple[str, list[Call]]:
        """Return a cleaned answer without its calls, and the calls.

        An answer that is cut inside of a call, or calls something else, has no calls.
        """
        mark, close = self.form.mark, self.form.end.strip()
        before, _, rest = text.partition(mark) if mark else ("", "", text)
        calls: list[Call] = []
        while rest or not calls:
            rest = rest.lstrip(BEFORE_CALL)
            value, stop = _decoded(rest, 0)
            call = self._call(value)
            if call is None:
                return text, []
            calls.append(call)
            rest = rest[stop:].lstrip()
            is_list = rest.startswith(",")
            rest = rest.removeprefix(close).lstrip()
            if not is_list and not (mark and rest.startswith(mark)):
                break
            rest = rest.removeprefix(mark)
        if rest and not mark:  # an object and more: no call, but a text with an object
            return text, []
        content = before + rest
        return content if content.strip() else "", calls[: self.most]

    def _call(self, value: object) -> Call | None:
        """The call that a JSON object is."""
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        given = value.get(self.form.key, {})
        return Call(value["name"], json.dumps(given)) if isinstance(given, dict) else None


@dataclass
class CallStream:
    """Holds back the part of an answer that may be calls, while it is written."""

    reader: CallReader
    text: str = ""
    given: int = 0  # characters of the text that were handed over
    held: str = ""  # behind the text: it may be the beginning of a special token

    def add(self, piece: str) -> str:
        """Return the text that is certainly no call."""
        self._clean(piece)
        mark = self.reader.form.mark
        if not mark:
            is_call = self.text.lstrip(BEFORE_CALL)[:1] in ("", "{")
            end = 0 if is_call else len(self.text)
        elif mark in self.text:
            end = self.text.index(mark)
        else:
            end = len(self.text) - possible_stop(self.text, (mark,))
        ready, self.given = self.text[self.given : end], max(end, self.given)
        return ready

    def _clean(self, piece: str) -> None:
        """Add a piece to the text, without special tokens, which models write in several ones."""
        self.held = self.reader.clean(self.held + piece)
        end = len(self.held) - possible_stop(self.held, self.reader.specials)
        self.text, self.held = self.text + self.held[:end], self.held[end:]

    def end(self) -> tuple[str, list[Call]]:
        """Return the text that was held back and is no call, and the calls."""
        content, calls = self.reader.read(self.text + self.held)
        return content[self.given :], calls
