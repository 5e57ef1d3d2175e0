"""Formats of rows from which a model learns to write: which columns each has, and its messages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from typing import NamedTuple

from petl.data.conversations import (
    USUAL,
    TurnKeys,
    conversation,
    declared_tools,
    past_turns,
    side,
    system_turn,
    without_loss,
)
from petl.data.tasks import TOOLS, Message
from petl.data.templates import columns_of, fill, read_text
from petl.data.validation import Row, passage, read, text


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        asked: columns that every row has.
        learned: likewise, but not needed for a prediction.
        optional: columns that rows may have.
        convert: makes the messages of a row, without `learned` if the row has none; None: the rows
            are plain texts.
        refusal: why rows of this format are not read unless `data.format` names it.
    """

    name: str
    asked: tuple[str, ...]
    learned: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row], list[Message]] | None
    refusal: str | None = None

    def required(self, *, labeled: bool) -> list[str]:
        """The columns that every row has; those that are learned only with `labeled`."""
        # without columns of its own, the prompt is the beginning of what is learned
        return [*self.asked, *(self.learned if labeled or not self.asked else ())]

    def described(self, columns: Iterable[str]) -> str:
        """What is made of those columns that rows have."""
        present = set(columns)
        asked = [name for name in (*self.asked, *self.optional) if name in present]
        learned = [name for name in self.learned if name in present and name != "rejected"]
        if self.convert is None:
            return f"{self.name} ({', '.join(asked)})"
        answers = ", ".join(learned) or "the assistant's turns"
        return f"{self.name} ({', '.join(asked)}; loss on {answers})"


# Rows to messages


def turns(row: Row, column: str, keys: TurnKeys) -> list[Message]:
    """The turns in one column, after functions and system prompt in columns of their own."""
    # a list of at least one turn: `conversation` refuses others
    found = read(row, column, partial(conversation, keys=keys))
    # ShareGPT has a system prompt in a column or as the first turn
    system = optional_system(row) if found[0]["role"] != "system" else []
    return [*optional_tools(row), *system, *found]


def alpaca(row: Row) -> list[Message]:
    """Instruction and input are one turn, with a line break between them if both are given."""
    # Alpaca's input is "" for instructions that need none
    given = read(row, "input", passage) if row.get("input") else ""
    instruction = read(row, "instruction", passage) if row["instruction"] is not None else ""
    asked = text("\n".join(part for part in (instruction, given) if part.strip()))
    # absent from rows to predict, of which only the question is needed
    answer = side(read(row, "output", text), "assistant") if "output" in row else []
    past = read(row, "history", past_turns) if "history" in row else []
    return [*optional_system(row), *past, {"role": "user", "content": asked}, *answer]


def pair(row: Row, prompt: str, answer: str) -> list[Message]:
    """A prompt and its answer, texts or lists of turns; there is no loss on turns of the prompt.

    Args:
        prompt: a column or a template, as `answer`.
    """
    asked = without_loss(read_side(row, prompt, "user"))
    # False for rows to predict, without an answer
    known = set(columns_of(answer)) <= row.keys()
    answers = read_side(row, answer, "assistant") if known else []
    return [*optional_tools(row), *optional_system(row), *asked, *answers]


def read_side(row: Row, value: str, role: str) -> list[Message]:
    """One side of a pair, in a column or by a template."""
    return read_text(row, value, lambda found: side(found, role))


def shared_length(sequences: Iterable[Sequence[object]]) -> int:
    """The number of entries with which all of these sequences begin."""
    places = zip(*sequences, strict=False)
    return len([*takewhile(lambda entries: all(e == entries[0] for e in entries), places)])


class Sides(NamedTuple):
    """The columns of preference pairs, and how turns in them are written."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    keys: TurnKeys = USUAL

    def read(self, row: Row) -> tuple[list[Message], list[Message], list[Message]]:
        """The prompt, without loss, and both answers, which may be conversations that begin alike.

        Raises:
            ValueError: the answers are the same, or there is no prompt.
        """
        chosen, rejected = (self.side(row, each) for each in (self.chosen, self.rejected))
        self.differing(chosen, rejected)
        # explicit prompt in TRL's words; otherwise the prompt is implicit, in both answers
        if all(turn["role"] == "assistant" for turn in [*chosen, *rejected]):
            if row.get(self.prompt) is None:
                raise ValueError(f"{self.chosen} is an answer alone, and there is no prompt")
            return self.asked(row), chosen, rejected
        # TRL's implicit prompt: the turns that both conversations begin with
        shared = shared_length([chosen, rejected])
        # what a person or a function said in one of them alone is no answer
        for column, turns in ((self.chosen, chosen), (self.rejected, rejected)):
            role = turns[shared]["role"] if len(turns) > shared else "none"
            if role != "assistant":
                raise ValueError(
                    f"{self.chosen} and {self.rejected} have different prompts, or one has no "
                    f"answer: they part at turn {shared + 1}, which in {column} is of the role "
                    f"{role}, not of the assistant"
                )
        prompt = [*optional_tools(row), *optional_system(row), *without_loss(chosen[:shared])]
        return prompt, chosen[shared:], rejected[shared:]

    def differing(self, chosen: object, rejected: object) -> None:
        """Raise ValueError if both answers of a pair are the same."""
        if chosen == rejected:
            raise ValueError(
                f"{self.chosen} and {self.rejected} are the same, so none is preferred: drop the "
                "row"
            )

    def asked(self, row: Row) -> list[Message]:
        """The turns of the prompt in a column of its own."""
        prompt = without_loss(self.side(row, self.prompt, "user"))
        return [*optional_tools(row), *optional_system(row), *prompt]

    def side(self, row: Row, column: str, role: str = "assistant") -> list[Message]:
        """The turns of a column; a text is a turn of the role."""
        return read_text(row, column, lambda found: side(found, role, self.keys))


def preference(row: Row) -> list[Message]:
    """The prompt and the chosen answer, which may be a conversation that begins with the prompt."""
    prompt, chosen, _ = Sides().read(row)
    return [*prompt, *chosen]


def with_system(messages: list[Message], template: str | None, row: Row) -> list[Message]:
    """The messages of a row with the system prompt of a template, unless they have their own."""
    if template is None or any(message["role"] == "system" for message in messages):
        return messages
    system = {"role": "system", "content": text(fill(template, row))}
    place = int(bool(messages) and messages[0]["role"] == TOOLS)  # after the functions
    return [*messages[:place], system, *messages[place:]]


def optional_system(row: Row) -> list[Message]:
    """The system prompt of a column of that name; none without it."""
    return read(row, "system", system_turn) if "system" in row else []


def optional_tools(row: Row) -> list[Message]:
    """The functions of a column of that name; none without it."""
    return read(row, "tools", declared_tools) if "tools" in row else []


# The formats


def text_format(value: str) -> Format:
    """Plain texts, in a column or by a template."""
    return Format("text", tuple(columns_of(value)), (), (), None)


def turns_format(name: str, column: str, *optional: str, keys: TurnKeys = USUAL) -> Format:
    """Conversations in one column, with turns of these keys."""
    convert = partial(turns, column=column, keys=keys)
    return Format(name, (column,), (), (*optional, "tools"), convert)


def pair_format(name: str, prompt: str, answer: str, *optional: str) -> Format:
    """Prompts and answers, each in a column or by a template."""
    asked = tuple(columns_of(prompt))
    # a template of the answer may repeat a column of the prompt
    learned = tuple(name for name in columns_of(answer) if name not in asked)
    convert = partial(pair, prompt=prompt, answer=answer)
    return Format(name, asked, learned, optional, convert)


RATED = (
    "has completions with a label: where it rates them, +task=kto learns from good and bad ones.\n"
    "data.format=prompt_completion trains on all, whatever their label"
)


@cache
def recognized() -> tuple[Format, ...]:
    """The formats that are recognized by their columns."""
    # the most specific first: columns of a later format may be extra columns in an earlier one
    return (
        turns_format("messages", "messages"),
        turns_format("sharegpt", "conversations", "system"),
        Format("alpaca", ("instruction",), ("output",), ("input", "system", "history"), alpaca),
        Format(
            "preference",
            (),
            ("chosen", "rejected"),
            ("prompt", "tools"),
            preference,
            refusal=(
                "has preference pairs (chosen, rejected): +task=dpo learns from both, as do orpo, "
                "kto and reward.\n"
                "data.format=preference trains on the chosen answers alone"
            ),
        ),
        pair_format("prompt_completion", "prompt", "completion", "system", "tools"),
    )


@cache
def formats() -> dict[str, Format]:
    """The formats that `data.format` names, plain texts included."""
    return {"text": text_format("text"), **{found.name: found for found in recognized()}}


def naming(columns: Iterable[str]) -> str:
    """Return the end of a message: how the columns of one's own format are named."""
    every = list(columns)
    # an object whose keys are columns is none to read: its keys are
    keys = {name.rpartition(".")[0] for name in every}
    names = [name for name in every if name not in keys | {"image", "images"}]
    first, *others = names or ["COLUMN"]
    if len(names) == 2:
        return f"data.prompt={first} data.answer={others[0]} for questions and answers"
    quoted = f"'data.prompt=\"{{{first}}} ...\"'"
    return f"data.text=COLUMN, data.messages=COLUMN, or {quoted} data.answer=COLUMN"


# Which task reads rows that the given task cannot read, by their columns


SETTINGS = (
    (("chosen", "rejected"), "+task=dpo"),
    (("prompt", "completion", "label"), "+task=kto"),
    *((tuple(each.required(labeled=True)), "data.task=causal_lm") for each in recognized()),
    (("tokens", "tags"), "data.task=token_classification"),
    (("tokens", "ner_tags"), "data.task=token_classification data.tags=ner_tags"),
    (("question", "context", "answers"), "data.task=question_answering"),
    (("query", "positive"), "data.task=retrieval"),
    (("query", "documents", "scores"), "data.task=retrieval"),
    (("sentence1", "sentence2", "score"), "data.task=retrieval"),
    (("text", "target"), "data.task=seq2seq"),
    (("text", "label"), "data.task=classification"),
)


def fitting_task(columns: Iterable[str], task: str) -> str | None:
    """Return the end of a message: which task reads rows with these columns; None if none does.

    Args:
        task: the one that does not.
    """
    names = set(columns)
    for required, setting in SETTINGS:
        if names.issuperset(required) and setting not in (f"data.task={task}", f"+task={task}"):
            return f".\nIt has {' and '.join(required)}: add {setting}"
    return None
