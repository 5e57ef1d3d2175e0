"""The columns that each task reads, and the conversion of raw rows to the task's rows."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING, ClassVar, TypeVar

from petl.data.base import SHARE, TextSource
from petl.data.conversations import MEANINGS
from petl.data.downloads import PREFIXES
from petl.data.faulty_rows import ERROR, SKIP
from petl.data.formats import fitting_task
from petl.data.label_column import refuse_unlikely_classes
from petl.data.tasks import (
    ABOVE_0,
    CLASSES,
    COLUMN,
    DIMS,
    DISTANCE,
    MARGIN,
    POOLING,
    THRESHOLD,
    later,
)
from petl.data.templates import columns_of, read_text
from petl.data.validation import (
    LazySourceRows,
    Row,
    SourceRows,
    label,
    number,
    numbered,
    read,
    require,
    similar,
    text,
    truth,
)
from petl.errors import InputError, shown, typed
from petl.system.files.read import parse_list
from petl.system.values import Rule, field, integer, one_of

if TYPE_CHECKING:
    from petl.data.tasks.base import Task

ROLES = Rule(
    f"a mapping of words to {', '.join(MEANINGS)} or themselves",
    lambda roles: all(to in (*MEANINGS, word) for word, to in roles.items()),
)
SEPARATOR = Rule("a text that is not empty", bool)
TASKS = Rule("a list of distinct names", lambda names: len(names) == len({*names} - {""}) > 0)
# ["a", or [a, b]; words at spaces may begin with [ as well, such as [1] and [CLS]
BROKEN_LIST = re.compile(r"^\s*\[\s*(['\"]|[^\s,]+,.*\]\s*$)", re.DOTALL)
T = TypeVar("T")
AnySourceRows = SourceRows | LazySourceRows


@dataclass(kw_only=True)
class ColumnSettings(TextSource, ABC):
    """Settings of rows in columns: column names, and how the rows of each task are read."""

    text: str = "text"
    text_pair: str | None = None  # column of a second text, encoded together with the first
    label: str = "label"
    # names of the classes in order; None: taken from the rows
    labels: list[str] | None = field(None, CLASSES)
    # between the classes of a cell, with multi_label; None: cells are lists
    separator: str | None = field(None, SEPARATOR)
    # columns of 0 or 1, one for each class, in place of `label`
    label_columns: list[str] | None = field(None, CLASSES)
    # from which probability on a class is predicted; None: validation rows choose it, else 0.5
    threshold: float | None = field(None, THRESHOLD)
    # names of the tasks of rows, in the order of their ids
    tasks: list[str] | None = field(None, TASKS)
    task_column: str = "task"  # with tasks: column of each row's task, a name or an id
    tokens: str = "tokens"
    tags: str = "tags"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    answer_start: str | None = None
    stride: int = field(128, integer(0))  # tokens by which the windows of a long context overlap
    max_answer_length: int = field(30, integer(1))  # tokens
    target: str = "target"
    prefix: str = ""  # put before each text, with seq2seq
    max_target_length: int = field(128, integer(1))  # tokens
    format: str | None = None  # of rows to write from, see `petl.data.formats`; None: recognized
    messages: str | None = None  # column of conversations, in place of text
    role: str | None = None  # key of a turn's role; None: role or from
    content: str | None = None  # key of its text; None: content or value
    # what the words of roles mean, such as {customer: user, agent: assistant}
    roles: dict[str, str] | None = field(None, ROLES)
    prompt: str | None = None  # column or template of questions: conversations of one turn each
    answer: str | None = None  # column or template of the answers to them
    system: str | None = None  # system prompt of conversations without one
    # columns of preference pairs, the better answer and the other one; None: chosen and rejected
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None  # column of answers with a label, good or bad; None: completion
    # settings of a task that is an objective: the group `task` of a run, which +task=NAME sets
    objective: dict[str, str | float | bool | None] | None = None
    image: str | None = None  # column of images; None: image or images, if there is one
    # folder that paths of images are relative to and inside of; None: that of the file
    image_folder: str | None = None
    # beginnings of URLs of images that are downloaded; None: none are
    image_urls: list[str] | None = field(None, PREFIXES)
    pack: bool = False  # several whole texts in a row of max_length; no attention across texts
    # maximum new tokens when answers of test rows are generated and scored
    generate: int | None = field(None, integer(1))
    streaming: bool = False  # read train rows as they are needed
    # rows of a stream in memory, among which the order is random
    shuffle_buffer: int = field(10_000, integer(1))
    # encoded rows of a stream, its first, that are held out if train.eval_steps is set
    held_rows: int = field(1000, integer(1))
    # rows that cannot be used: error, as None, or skip: they are left out
    bad_rows: str | None = field(None, one_of(ERROR, SKIP))
    # of retrieval: columns, and how texts become vectors, see `petl.data.tasks.retrieval`
    query: str | None = None
    positive: str | None = None
    negatives: str | None = None  # of a text or a list; None: negative, negatives, negative_1, ...
    loss: str | None = None  # None: the first that reads the columns of the rows
    pooling: str | None = field(
        None, POOLING
    )  # None: as the base model's folder says, as the next three
    normalize: bool | None = None
    query_prefix: str | None = None
    document_prefix: str | None = None
    # widths for which the loss is computed; None: the full one
    dims: list[int] | None = field(None, DIMS)
    # copies of the own positive are no negatives; None: true
    mask_duplicates: bool | None = None
    # of the loss; None: its default
    scale: float | None = field(None, ABOVE_0)
    margin: float | None = field(None, MARGIN)
    symmetric: bool | None = None
    distance: str | None = field(None, DISTANCE)
    temperature: float | None = field(None, ABOVE_0)
    corpus: str | None = None  # test set: files of documents and queries with id and text
    queries: str | None = None
    qrels: str | None = None  # and of judgements, TREC's four columns
    # fraction of the training rows that is held out if there are no test rows
    test_share: float = field(0.1, SHARE)


class TaskColumns(ABC):
    """The columns of one task, named by `settings`, and the conversion of their rows.

    Attributes:
        labeled: False to read rows for a prediction, which need no labels, answers or targets.
    """

    own_settings: ClassVar[tuple[str, ...]]  # settings that only some tasks use, this one included
    # of these, those that rows without labels are read by; empty: all
    to_predict: ClassVar[tuple[str, ...]] = ()
    has_test_set = False  # settings of the task name test rows
    reads_images: ClassVar[bool] = False  # parts of turns may be images
    of_run = False  # the rows are for the task of a finished run, and for no other

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        self.settings, self.labeled = settings, labeled

    @abstractmethod
    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return the columns to read of those that are present.

        Raises:
            InputError: one is missing; the message names the `origin`.
        """

    @abstractmethod
    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Read what the task takes from all training rows (such as the classes), without torch.

        Returns:
            The function that builds the task, and imports torch.

        Raises:
            InputError: a value is not valid, or the rows do not suit the task.
        """

    @abstractmethod
    def convert(self, row: Row) -> Row:
        """Convert a raw row to the columns that `Task.encode_rows` reads.

        Raises:
            ValueError: the row is not valid; the message begins with the name of the column.
        """

    def described(self) -> str:
        """The format of the rows; "" if settings name all columns."""
        return ""

    def naming(self, missing: str, names: Sequence[str]) -> str:
        """The end of the message about a missing column: a similar name, and its setting."""
        hint = similar(missing, names) or "."
        for setting in self.own_settings:  # a column of a template has none
            value = getattr(self.settings, setting) or setting
            if missing in (value if isinstance(value, list) else [value]):
                ways = [typed(f"data.{setting}", name) for name in names]
                quoted = next((way for way in ways if way[0] == "'"), None)
                example = f", such as {quoted}" if quoted else ""
                return f"{hint} Name the column with data.{setting}=NAME{example}"
        return hint.removesuffix(".")

    def split(
        self, train: list[Row], test: list[Row], *, are_held_out: bool
    ) -> tuple[list[Row], list[Row]]:
        """Return the rows to train on and those to score, from converted rows.

        Args:
            are_held_out: True if the test rows were taken from those to train on.
        """
        return train, test


class RowTaskColumns(TaskColumns):
    """Mixin before the columns of a kind of task: a column more, with the task of each row."""

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return the columns of the kind, and that of the task."""
        names = list(present)
        more = require([self.settings.task_column], names, origin)
        return list(dict.fromkeys([*super().choose(names, origin), *more]))

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build the task of the kind, for rows of several tasks."""
        build, tasks = super().task(rows), self.settings.tasks or ()
        return lambda: resolve_name("petl.data.tasks.row_tasks:of_tasks")(build(), tasks)

    def convert(self, row: Row) -> Row:
        """The columns of the kind, and `task`: the name of the row's task."""
        return {**super().convert(row), COLUMN: read(row, self.settings.task_column, self.name_of)}

    def name_of(self, value: object) -> str:
        """The task that a value names, or has as its id.

        Raises:
            ValueError: there is no such task.
        """
        names, text = self.settings.tasks or [], str(value).strip()
        if isinstance(value, str) and text in names:
            return text
        is_id = text.isascii() and text.isdecimal() and len(text) < 10
        if is_id and not isinstance(value, bool) and int(text) < len(names):
            return names[int(text)]
        raise ValueError(
            f"is {shown(value)}, which is no task: {', '.join(names)}, or their ids from 0"
        )


@cache
def with_row_tasks(kind: type[TaskColumns]) -> type[object]:
    """Return the columns of a kind of task for rows of several tasks."""
    return type(kind.__name__, (RowTaskColumns, kind), {"__doc__": kind.__doc__})


class NamedColumns(TaskColumns, ABC):
    """Columns that all have a setting with their name.

    Attributes:
        inputs: columns that are always read.
        targets: columns that are read of labeled rows only.
    """

    inputs: list[str]
    targets: list[str]

    def columns(self) -> list[str]:
        """The names of the columns to read."""
        return [*self.inputs, *(self.targets if self.labeled else ())]

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return all columns of this task; see `TaskColumns.choose`."""
        columns, names = self.columns(), list(present)
        missing = next((column for column in columns if column not in names), None)
        hint = None
        if missing is not None:
            other = None if self.of_run else fitting_task(names, self.settings.task)
            hint = other or self.naming(missing, names)
        return require(columns, names, origin, hint)


class ClassLabelColumns(NamedColumns, ABC):
    """Rows with classes: those of `data.labels`, else all that occur in the training rows."""

    shown: ClassVar[tuple[str, ...]] = ("text", "text_pair")  # as of tasks on texts
    column: str  # the column with the class, or with a list of classes
    texts: set[str] | None = None  # with several classes in a row: cells read that are one class

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
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
            found = f"a single class, {classes[0]!r}," if classes else "no class"
            raise InputError(
                f"{rows.origin} has {found} in column {self.column!r}: at least two are needed"
            )
        # `class_of` needs these; `task` is always called before `convert`
        self.number = {name: i for i, name in enumerate(classes)}
        self.parse: Callable[[object], str] = numbered(classes) if rows.classes else label
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
        refuse_unlikely_classes(
            counts, self.column, rows.origin, rows.whole, self.columns(), self.texts
        )
        return counts

    @abstractmethod
    def names(self, rows: AnySourceRows) -> Iterable[str]:
        """The name of the class of each label in the rows."""

    @abstractmethod
    def with_classes(self, classes: list[str]) -> "Callable[[], Task]":
        """Build the task with these classes."""

    def class_of(self, value: object) -> int:
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

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.column = settings.label
        self.inputs, self.targets = text_columns(settings), [self.column]

    def names(self, rows: AnySourceRows) -> Iterable[str]:
        """The values of the label column."""
        return rows.column(self.column, label)

    def with_classes(self, classes: list[str]) -> "Callable[[], Task]":
        """Build a classification task."""
        return later("classification", classes=classes, max_length=self.settings.max_length)

    def convert(self, row: Row) -> Row:
        """Columns `text`, `text_pair` if there is one, and `label` of labeled rows."""
        texts = texts_of(self.settings, row)
        if not self.labeled:
            return texts
        return {**texts, "label": read(row, self.column, self.class_of)}


class MultiLabelColumns(ClassLabelColumns):
    """Texts, or pairs of texts, with any number of classes each."""

    own_settings = (
        *("text", "text_pair", "label", "labels", "separator", "label_columns", "threshold"),
    )

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.column, self.each, self.texts = settings.label, settings.label_columns, set()
        if self.each and settings.separator is not None:
            raise InputError(
                f"data.separator={settings.separator!r} is for one column of classes, and "
                f"data.label_columns names {len(self.each)}: give one of both"
            )
        if self.each and settings.labels not in (None, self.each):
            raise InputError(
                f"data.labels={settings.labels} and data.label_columns={self.each} name classes: "
                "give one of both"
            )
        self.inputs, self.targets = text_columns(settings), self.each or [self.column]

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build the task; the columns of classes name them."""
        if not self.each:
            return super().task(rows)
        self.number = {name: i for i, name in enumerate(self.each)}
        return self.with_classes(self.each)

    def naming(self, missing: str, names: Sequence[str]) -> str:
        """Also that each class may have a column."""
        columns = "" if self.each else ", or columns of 0 or 1 with data.label_columns=[NAME,NAME]"
        return f"{super().naming(missing, names)}{columns}"

    def names(self, rows: AnySourceRows) -> Iterable[str]:
        """The classes of all rows."""
        # numbers of classes that the origin names are not read
        return (name for names in rows.column(self.column, self.cell) for name in names)

    def with_classes(self, classes: list[str]) -> "Callable[[], Task]":
        """Build a multi-label task."""
        settings = self.settings
        return later(
            "multi_label",
            classes=classes,
            max_length=settings.max_length,
            threshold=settings.threshold,
        )

    def convert(self, row: Row) -> Row:
        """Columns `text`, `text_pair` if there is one, and `label`: numbers of classes."""
        texts = texts_of(self.settings, row)
        if not self.labeled:
            return texts
        if self.each:
            has = [read(row, name, truth) for name in self.each]
            return {**texts, "label": [number for number, value in enumerate(has) if value]}
        numbers = read(row, self.column, self.numbers_of)
        return {**texts, "label": sorted({*numbers})}

    def numbers_of(self, value: object) -> list[int]:
        """The numbers of the classes in a cell."""
        return [self.class_of(name) for name in self.values(value)]

    def cell(self, value: object) -> list[str]:
        """The names of the classes in a cell."""
        return [label(each) for each in self.values(value)]

    def values(self, value: object) -> list[object]:
        """The values in a cell: of a list, or of a text at the separator; none if it is empty."""
        separator = self.settings.separator
        if value is None or value != value or value == "":  # NaN, of a table
            return []
        if not isinstance(value, str):
            return value if isinstance(value, list) else [value]
        # a csv file has no lists
        if separator is not None:
            return [part for part in value.split(separator) if part.strip()]
        if (several := parse_list(value)) is not None:
            return several
        if value.strip() and self.texts is not None:
            self.texts.add(value.strip())
        return [value] if value.strip() else []


class RegressionColumns(NamedColumns):
    """Texts, or pairs of texts, with numbers."""

    own_settings = ("text", "text_pair", "label")

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.inputs, self.targets = text_columns(settings), [settings.label]

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build a regression task."""
        return later("regression", max_length=self.settings.max_length)

    def convert(self, row: Row) -> Row:
        """Columns `text`, `text_pair` if there is one, and `label` of labeled rows."""
        texts = texts_of(self.settings, row)
        if not self.labeled:
            return texts
        return {**texts, "label": read(row, self.settings.label, number)}


class TokenClassificationColumns(ClassLabelColumns):
    """Lists of words with a class for each word."""

    own_settings = ("tokens", "tags", "labels")

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.column = settings.tags
        self.inputs, self.targets = [settings.tokens], [self.column]

    def names(self, rows: AnySourceRows) -> Iterable[str]:
        """The tags in all rows."""
        return (name for tags in rows.column(self.column, items(label)) for name in tags)

    def with_classes(self, classes: list[str]) -> "Callable[[], Task]":
        """Build a token classification task."""
        return later("token_classification", classes=classes, max_length=self.settings.max_length)

    def convert(self, row: Row) -> Row:
        """Columns `tokens` and, of labeled rows, `tags`: lists of equal length."""
        tokens = read(row, self.settings.tokens, items(word))
        if not self.labeled:
            return {"tokens": tokens}
        tags = read(row, self.column, items(self.class_of))
        if len(tags) != len(tokens):
            raise ValueError(
                f"{self.column} has {len(tags)} items, but {self.settings.tokens} has "
                f"{len(tokens)} words"
            )
        return {"tokens": tokens, "tags": tags}


def text_columns(settings: ColumnSettings) -> list[str]:
    """The columns of the text, and those of the second text if there is one."""
    pair = settings.text_pair
    return [*columns_of(settings.text), *(columns_of(pair) if pair is not None else ())]


def texts_of(settings: ColumnSettings, row: Row) -> Row:
    """The text or both texts of a row, as `text` and `text_pair`."""
    pair = settings.text_pair
    second = {} if pair is None else {"text_pair": read_text(row, pair, text)}
    return {"text": read_text(row, settings.text, text), **second}


def items_in(cell: str) -> Sequence[object]:
    """The items in a cell of a csv file: of a list as it is written, else words at spaces.

    Raises:
        ValueError: the cell begins like a list, and is none.
    """
    found = parse_list(cell)
    if found is None and BROKEN_LIST.search(cell):
        raise ValueError(
            f'is {shown(cell)}, which is no complete list: write ["a", "b"], or words with a space '
            "between them"
        )
    return cell.split() if found is None else found


def items(parse: Callable[[object], T]) -> Callable[[object], list[T]]:
    """A parser of lists that applies `parse` to each item; a string is read by `items_in`."""

    def read_items(value: object) -> list[T]:
        values = [*items_in(value)] if isinstance(value, str) else value
        if not isinstance(values, list) or not values:
            raise ValueError("is missing" if value is None else f"is {shown(value)}, not a list")
        parsed = []
        for i, item in enumerate(values, start=1):
            try:
                parsed.append(parse(item))
            except ValueError as error:
                raise ValueError(f"has item {i} that {error}") from error
        return parsed

    return read_items


def word(value: object) -> str:
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
