"""The columns that each task reads, and the conversion of raw rows to the task's rows."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from petl.data.base import TextSource
from petl.data.label_column import refuse_class_per_row
from petl.data.validation import (
    LazySourceRows,
    Row,
    SourceRows,
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

AnySourceRows = SourceRows | LazySourceRows


@dataclass(kw_only=True)
class ColumnSettings(TextSource, ABC):
    """Settings of rows in columns: column names, and how the rows of each task are read."""

    text: str = "text"
    text_pair: str | None = None  # column of a second text, encoded together with the first
    label: str = "label"
    labels: list[str] | None = None  # names of the classes in order; None: taken from the rows
    tokens: str = "tokens"
    tags: str = "tags"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    answer_start: str | None = None
    stride: int = 128  # tokens by which the windows of a long context overlap
    max_answer_length: int = 30  # tokens
    target: str = "target"
    prefix: str = ""  # put before each text, with seq2seq
    max_target_length: int = 128  # tokens
    messages: str | None = None  # column of conversations, in place of text
    prompt: str | None = None  # column of questions: conversations of one turn each
    answer: str | None = None  # column of the answers to them
    pack: bool = False  # join texts into blocks of max_length; no attention across texts
    generate: int | None = (
        None  # maximum new tokens when answers of test rows are generated and scored
    )
    streaming: bool = False  # read train rows as they are needed
    shuffle_buffer: int = 10_000  # rows of a stream in memory, among which the order is random
    held_rows: int = (
        1000  # encoded rows of a stream, its first, that are held out if train.eval_steps is set
    )
    test_share: float = (
        0.1  # fraction of the training rows that is held out if there are no test rows
    )


class TaskColumns(ABC):
    """The columns of one task, named by `settings`, and the conversion of their rows."""

    own_settings: ClassVar[tuple[str, ...]]  # settings that only some tasks use, this one included

    def __init__(self, settings: ColumnSettings) -> None:
        self.settings = settings

    @abstractmethod
    def columns(self) -> list[str]:
        """The names of the columns to read."""

    @abstractmethod
    def task(self, rows: AnySourceRows) -> Task:
        """Build the task, with what depends on all training rows (such as the classes).

        Raises:
            InputError: a value is not valid, or the rows do not suit the task.
        """

    @abstractmethod
    def convert(self, row: Row) -> Row:
        """Convert a raw row to the columns that `Task.encode_rows` reads.

        Raises:
            ValueError: the row is not valid; the message begins with the name of the column.
        """


class ClassLabelColumns(TaskColumns, ABC):
    """Rows with classes: those of `data.labels`, else all that occur in the training rows."""

    column: str  # the column with the class, or with a list of classes

    def task(self, rows: AnySourceRows) -> Task:
        """Build the task with all classes, and remember their numbers for `class_of`.

        Raises:
            InputError: there is a single class, or one for each row; class names are given twice.
        """
        names = self.settings.labels
        if names and rows.classes:
            raise InputError(
                f"data.labels={names} is for data without class names, but {rows.origin} has its "
                f"own ({', '.join(rows.classes[:5])}): leave data.labels out"
            )
        # `names` reads the complete column: of a stream one pass over the file
        classes = names or rows.classes or in_order(self.counted(rows))
        if len(classes) < 2:
            raise InputError(
                f"{rows.origin} has a single class, {classes[0]!r}, in column {self.column!r}: at "
                "least two are needed"
            )
        # `class_of` needs these; `task` is always called before `convert`
        self.number = {name: i for i, name in enumerate(classes)}
        self.parse: Callable[[Any], str] = numbered(classes) if rows.classes else label
        self.where_unknown = (  # the end of the message about an unknown class
            "data.labels lacks; add it there"
            if names
            else f"{rows.origin} lacks; add training rows of it"
        )
        return self.with_classes(classes)

    def counted(self, rows: AnySourceRows) -> Counter[str]:
        """How often each class occurs in the rows.

        Raises:
            InputError: hardly any class occurs twice, so that the column holds something else.
        """
        counts = Counter(self.names(rows))
        refuse_class_per_row(counts, self.column, rows.origin, rows.whole, self.columns())
        return counts

    @abstractmethod
    def names(self, rows: AnySourceRows) -> Iterable[str]:
        """The name of the class of each label in the rows."""

    @abstractmethod
    def with_classes(self, classes: list[str]) -> Task:
        """Build the task with these classes."""

    def class_of(self, value: Any) -> int:
        """The number of the class that a value names.

        Raises:
            ValueError: there is no such class.
        """
        name = self.parse(value)
        if name not in self.number:
            raise ValueError(f"is {name!r}, which {self.where_unknown}, or remove this row")
        return self.number[name]


class ClassificationColumns(ClassLabelColumns):
    """Texts, or pairs of texts, with classes."""

    own_settings = ("text", "text_pair", "label", "labels")

    def __init__(self, settings: ColumnSettings) -> None:
        super().__init__(settings)
        self.column = settings.label

    def columns(self) -> list[str]:
        """The text, the second text if there is one, and the class."""
        return [*text_columns(self.settings), self.column]

    def names(self, rows: AnySourceRows) -> Iterable[str]:
        """The values of the label column."""
        return rows.column(self.column, label)

    def with_classes(self, classes: list[str]) -> Task:
        """Build a classification task."""
        return Classification(classes=classes, max_length=self.settings.max_length)

    def convert(self, row: Row) -> Row:
        """Columns `text`, `text_pair` if there is one, and `label`."""
        return {**texts_of(self.settings, row), "label": read(row, self.column, self.class_of)}


class RegressionColumns(TaskColumns):
    """Texts, or pairs of texts, with numbers."""

    own_settings = ("text", "text_pair", "label")

    def columns(self) -> list[str]:
        """The text, the second text if there is one, and the number."""
        return [*text_columns(self.settings), self.settings.label]

    def task(self, rows: AnySourceRows) -> Task:
        """Build a regression task."""
        return Regression(max_length=self.settings.max_length)

    def convert(self, row: Row) -> Row:
        """Columns `text`, `text_pair` if there is one, and `label`."""
        return {**texts_of(self.settings, row), "label": read(row, self.settings.label, number)}


class TokenClassificationColumns(ClassLabelColumns):
    """Lists of words with a class for each word."""

    own_settings = ("tokens", "tags", "labels")

    def __init__(self, settings: ColumnSettings) -> None:
        super().__init__(settings)
        self.column = settings.tags

    def columns(self) -> list[str]:
        """The words and their tags."""
        return [self.settings.tokens, self.column]

    def names(self, rows: AnySourceRows) -> Iterable[str]:
        """The tags in all rows."""
        return (name for tags in rows.column(self.column, items(label)) for name in tags)

    def with_classes(self, classes: list[str]) -> Task:
        """Build a token classification task."""
        return TokenClassification(classes=classes, max_length=self.settings.max_length)

    def convert(self, row: Row) -> Row:
        """Columns `tokens` and `tags`, lists of equal length."""
        tokens = read(row, self.settings.tokens, items(word))
        tags = read(row, self.column, items(self.class_of))
        if len(tags) != len(tokens):
            raise ValueError(
                f"{self.column} has {len(tags)} items, but {self.settings.tokens} has "
                f"{len(tokens)} words"
            )
        return {"tokens": tokens, "tags": tags}


class CausalLMColumns(TaskColumns):
    """Texts, or conversations in one column (messages) or two (prompt and answer)."""

    own_settings = ("text", "messages", "prompt", "answer", "pack", "generate")

    def __init__(self, settings: ColumnSettings) -> None:
        super().__init__(settings)
        prompt, answer, messages = settings.prompt, settings.answer, settings.messages
        if (prompt is None) != (answer is None):
            raise InputError(
                f"data.prompt={prompt} and data.answer={answer}: give both, the columns of "
                "questions and answers, or neither"
            )
        if messages is not None and prompt is not None:
            raise InputError(f"data.messages={messages} and data.prompt={prompt}: give one of them")
        if settings.pack and self.chat:
            raise InputError(
                "data.pack=true is for plain text, but data.messages or data.prompt is given: set "
                "data.pack=false"
            )
        if settings.generate is not None and not self.chat:
            raise InputError(
                f"data.generate={settings.generate} is for conversations, which have prompts: give "
                "data.messages, or data.prompt and data.answer"
            )

    @property
    def chat(self) -> bool:
        """True if rows are conversations."""
        return self.settings.messages is not None or self.settings.prompt is not None

    def columns(self) -> list[str]:
        """The conversation, prompt and answer, or the text."""
        settings = self.settings
        if settings.prompt is not None and settings.answer is not None:
            return [settings.prompt, settings.answer]
        return [settings.messages or settings.text]

    def task(self, rows: AnySourceRows) -> Task:
        """Build a causal language modeling task."""
        settings = self.settings
        return CausalLM(
            max_length=settings.max_length,
            chat=self.chat,
            pack=settings.pack,
            generate=settings.generate,
        )

    def convert(self, row: Row) -> Row:
        """Column `messages` of conversations, else `text`."""
        columns = self.columns()
        if not self.chat:
            return {"text": read(row, columns[0], passage)}
        if self.settings.messages is not None:
            return {"messages": read(row, columns[0], conversation)}
        # prompt and answer are a conversation of two turns
        roles = zip(("user", "assistant"), columns, strict=True)
        return {"messages": [{"role": r, "content": read(row, c, text)} for r, c in roles]}


class Seq2SeqColumns(TaskColumns):
    """Texts with target texts."""

    own_settings = ("text", "target", "prefix", "max_target_length", "generate")

    def columns(self) -> list[str]:
        """The text and the target."""
        return [self.settings.text, self.settings.target]

    def task(self, rows: AnySourceRows) -> Task:
        """Build a sequence-to-sequence task."""
        settings = self.settings
        return Seq2Seq(
            max_length=settings.max_length,
            max_target_length=settings.max_target_length,
            prefix=settings.prefix,
            generate=settings.generate,
        )

    def convert(self, row: Row) -> Row:
        """Columns `text` and `target`."""
        settings = self.settings
        return {"text": read(row, settings.text, text), "target": read(row, settings.target, text)}


def text_columns(settings: ColumnSettings) -> list[str]:
    """The column of the text, and that of the second text if there is one."""
    pair = settings.text_pair
    return [settings.text] if pair is None else [settings.text, pair]


def texts_of(settings: ColumnSettings, row: Row) -> Row:
    """The text or both texts of a row, as `text` and `text_pair`."""
    columns = zip(("text", "text_pair"), text_columns(settings), strict=False)
    return {name: read(row, column, text) for name, column in columns}


def word(value: Any) -> str:
    """Check a word: a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{shown(value)}, not a word")
    return value


def in_order(labels: Collection[str]) -> list[str]:
    """The labels, sorted by value if all are integers, else alphabetically."""
    # Python converts no text of thousands of digits
    if all(name.removeprefix("-").isdecimal() and len(name) < 1000 for name in labels):
        return sorted(labels, key=lambda name: (int(name), name))
    return sorted(labels)
