"""What rows in columns mean, one class a task: which columns are read and what is made of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from petl.data.base import TextSource
from petl.data.validation import (
    PassingRows,
    Row,
    Rows,
    conversation,
    items,
    label,
    number,
    numbered,
    passage,
    read,
    shown,
    text,
)
from petl.errors import InputError
from petl.tasks.base import Task
from petl.tasks.causal_lm import CausalLM
from petl.tasks.classification import Classification
from petl.tasks.regression import Regression
from petl.tasks.seq2seq import Seq2Seq
from petl.tasks.token_classification import TokenClassification

Given = Rows | PassingRows


@dataclass(kw_only=True)
class ColumnSettings(TextSource, ABC):
    """Settings of rows in columns: names of columns, and how the rows of each task are read."""

    text: str = "text"
    text_pair: str | None = None  # a second text, that is read with the first
    label: str = "label"
    labels: list[str] | None = None  # the classes in order; None: those of the rows
    tokens: str = "tokens"
    tags: str = "tags"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    answer_start: str | None = None
    stride: int = 128  # tokens that windows of a long context share
    max_answer_length: int = 30  # tokens
    target: str = "target"
    prefix: str = ""  # before each text of a seq2seq
    max_target_length: int = 128  # tokens
    messages: str | None = None  # conversations, in place of text
    prompt: str | None = None  # conversations of one turn each
    answer: str | None = None
    pack: bool = False  # texts end to end, cut into blocks of max_length; each sees itself only
    generate: int | None = None  # most tokens of answers that are generated to score the test rows
    streaming: bool = False  # whether train rows are read as they are needed
    shuffle_buffer: int = 10_000  # rows of a stream that the next one is drawn from
    held_rows: int = 1000  # encoded rows of a stream, its first, that train.eval_steps holds out
    test_share: float = 0.1  # of the training rows, held out when there are no test rows


class Form(ABC):
    """How the rows of one task are read. `given` are the settings of the data."""

    reads: ClassVar[tuple[str, ...]]  # the settings that are for this task and no other

    def __init__(self, given: ColumnSettings) -> None:
        self.given = given

    @abstractmethod
    def columns(self) -> list[str]:
        """The columns that are read."""

    @abstractmethod
    def task(self, rows: Given) -> Task:
        """The task, with what all rows to learn from say of it."""

    @abstractmethod
    def convert(self, row: Row) -> Row:
        """A row as the task encodes it.

        Raises:
            ValueError: something is wrong with the row.
        """


class Labels(Form, ABC):
    """Rows with classes: those that are given, or that all rows to learn from have together."""

    column: str  # of the classes

    def task(self, rows: Given) -> Task:
        given = self.given.labels
        if given and rows.classes:
            raise InputError(
                f"data.labels={given} is for labels without names, and {rows.origin} names its "
                f"own, {', '.join(rows.classes[:5])}: leave it out"
            )
        classes = given or rows.classes or in_order(self.names(rows))
        if len(classes) < 2:
            raise InputError(f"{rows.origin} has one class only, {classes[0]!r}, in {self.column}")
        self.number = {name: i for i, name in enumerate(classes)}
        self.parse: Callable[[Any], str] = numbered(classes) if rows.classes else label
        self.lacking = (
            "data.labels lacks; add it there"
            if given
            else f"{rows.origin} lacks; add rows of it to train on"
        )
        return self.with_classes(classes)

    @abstractmethod
    def names(self, rows: Given) -> set[str]:
        """The names of the classes in rows."""

    @abstractmethod
    def with_classes(self, classes: list[str]) -> Task:
        """The task with these classes."""

    def class_of(self, value: Any) -> int:
        """The number of a class."""
        name = self.parse(value)
        if name not in self.number:
            raise ValueError(f"is {name!r}, which {self.lacking}, or leave this one out")
        return self.number[name]


class ClassificationForm(Labels):
    """Texts, or pairs of them, with classes."""

    reads = ("text", "text_pair", "label", "labels")

    def __init__(self, given: ColumnSettings) -> None:
        super().__init__(given)
        self.column = given.label

    def columns(self) -> list[str]:
        return [*text_columns(self.given), self.column]

    def names(self, rows: Given) -> set[str]:
        return set(rows.column(self.column, label))

    def with_classes(self, classes: list[str]) -> Task:
        return Classification(classes=classes, max_length=self.given.max_length)

    def convert(self, row: Row) -> Row:
        return {**texts_of(self.given, row), "label": read(row, self.column, self.class_of)}


class RegressionForm(Form):
    """Texts, or pairs of them, with numbers."""

    reads = ("text", "text_pair", "label")

    def columns(self) -> list[str]:
        return [*text_columns(self.given), self.given.label]

    def task(self, rows: Given) -> Task:
        return Regression(max_length=self.given.max_length)

    def convert(self, row: Row) -> Row:
        return {**texts_of(self.given, row), "label": read(row, self.given.label, number)}


class TokenForm(Labels):
    """Words with classes."""

    reads = ("tokens", "tags", "labels")

    def __init__(self, given: ColumnSettings) -> None:
        super().__init__(given)
        self.column = given.tags

    def columns(self) -> list[str]:
        return [self.given.tokens, self.column]

    def names(self, rows: Given) -> set[str]:
        return {name for tags in rows.column(self.column, items(label)) for name in tags}

    def with_classes(self, classes: list[str]) -> Task:
        return TokenClassification(classes=classes, max_length=self.given.max_length)

    def convert(self, row: Row) -> Row:
        tokens = read(row, self.given.tokens, items(word))
        tags = read(row, self.column, items(self.class_of))
        if len(tags) != len(tokens):
            raise ValueError(f"{self.column} has {len(tags)} items for {len(tokens)} words")
        return {"tokens": tokens, "tags": tags}


class CausalForm(Form):
    """Plain texts, or conversations."""

    reads = ("text", "messages", "prompt", "answer", "pack", "generate")

    def __init__(self, given: ColumnSettings) -> None:
        super().__init__(given)
        if (given.prompt is None) != (given.answer is None):
            raise InputError(
                f"data.prompt={given.prompt} and data.answer={given.answer}: give both, the "
                "columns of what is asked and answered, or neither"
            )
        if given.messages is not None and given.prompt is not None:
            raise InputError(
                f"data.messages={given.messages} and data.prompt={given.prompt}: give one of them"
            )
        if given.pack and self.chat:
            raise InputError("data.pack=true is for plain text, not for conversations")
        if given.generate is not None and not self.chat:
            raise InputError(
                f"data.generate={given.generate} is for conversations, which say what is asked: "
                "give data.messages, or data.prompt and data.answer"
            )

    @property
    def chat(self) -> bool:
        return self.given.messages is not None or self.given.prompt is not None

    def columns(self) -> list[str]:
        given = self.given
        if given.prompt is not None and given.answer is not None:
            return [given.prompt, given.answer]
        return [given.messages or given.text]

    def task(self, rows: Given) -> Task:
        given = self.given
        return CausalLM(
            max_length=given.max_length, chat=self.chat, pack=given.pack, generate=given.generate
        )

    def convert(self, row: Row) -> Row:
        columns = self.columns()
        if not self.chat:
            return {"text": read(row, columns[0], passage)}
        if self.given.messages is not None:
            return {"messages": read(row, columns[0], conversation)}
        roles = zip(("user", "assistant"), columns, strict=True)
        return {"messages": [{"role": r, "content": read(row, c, text)} for r, c in roles]}


class PairForm(Form):
    """Texts with what is to be written of them."""

    reads = ("text", "target", "prefix", "max_target_length", "generate")

    def columns(self) -> list[str]:
        return [self.given.text, self.given.target]

    def task(self, rows: Given) -> Task:
        given = self.given
        return Seq2Seq(
            max_length=given.max_length,
            max_target_length=given.max_target_length,
            prefix=given.prefix,
            generate=given.generate,
        )

    def convert(self, row: Row) -> Row:
        given = self.given
        return {"text": read(row, given.text, text), "target": read(row, given.target, text)}


def text_columns(given: ColumnSettings) -> list[str]:
    return [given.text] if given.text_pair is None else [given.text, given.text_pair]


def texts_of(given: ColumnSettings, row: Row) -> Row:
    """The text of a row, or both of them."""
    columns = zip(("text", "text_pair"), text_columns(given), strict=False)
    return {name: read(row, column, text) for name, column in columns}


def word(value: Any) -> str:
    """A word of a text."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{shown(value)}, not a word")
    return value


def in_order(labels: set[str]) -> list[str]:
    """The distinct labels, numbers by value and names by alphabet."""
    if all(name.removeprefix("-").isdecimal() for name in labels):
        return sorted(labels, key=lambda name: (int(name), name))
    return sorted(labels)
