"""Base classes of data sources: settings, shuffling and splitting of rows, streams."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pkgutil import resolve_name
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
from omegaconf import DictConfig

from petl.data import SOURCES
from petl.data.tasks import NEW_TOKENS, NO_TEXT, TASKS
from petl.data.validation import FaultyRow, RefusedRow, Row, placed
from petl.errors import InputError, choose
from petl.system.imports.peft_hook import import_modules
from petl.system.settings.schema import plain
from petl.system.values import bounded, check_rules, field, integer, one_of, read_fields

if TYPE_CHECKING:
    from datasets import Dataset

    from petl.data.faulty_rows import Origin
    from petl.data.tasks.base import P, Task

BY_CLASS = "by_class"  # value of data.order
SEVERAL = ("tasks", "mixture")  # values of data.source that read several sets
BALANCED = "balanced"  # of data.sampling and train.class_weights
ENCODED_TOGETHER = 100  # rows of a call of `Task.encode_rows`; assumption
SHARE = bounded(gt=0, lt=1)  # of rows to test on, which leaves some to train on
T = TypeVar("T")
READING = logging.getLogger("petl.data")


@dataclass(frozen=True)
class Stream:
    """A stream of rows that are not encoded yet.

    Attributes:
        rows: starts an iterator from the first row; each iterator yields the same rows.
        buffer: number of rows in the shuffle buffer.
        locate: gives the place of a row for messages; None: unknown.
        held: number of encoded rows, the first of the stream, that are held out for validation if
            the run validates, together with the remaining rows of their group (`Task.group`).
    """

    rows: Callable[[], Iterator[Row]]
    buffer: int
    held: int
    locate: Callable[[int], str] | None = None

    def first_rows(self, count: int) -> "Dataset":
        """The first `count` rows, not encoded."""
        dataset = resolve_name("datasets:Dataset")  # takes a second
        return dataset.from_list(list(islice(self.rows(), count)))

    def encoded(self, task: "Task[P]", processor: "P") -> Iterator[Row]:
        """Yield the rows as `task` encodes them."""
        rows, start = self.rows(), 0
        while batch := list(islice(rows, ENCODED_TOGETHER)):
            try:
                encoded = encode(task, processor, batch)
            except RefusedRow:
                numbers = range(start, start + len(batch))
                name_refused(task, processor, batch, self.locate, numbers)
                raise
            yield from encoded
            start += len(batch)


def name_refused(
    task: "Task[P]",
    processor: "P",
    rows: Sequence[Row],
    locate: Callable[[int], str] | None,
    numbers: Sequence[int],
) -> None:
    """Raise InputError for the first of some rows that the task refuses, with its place.

    Args:
        locate: gives the place of a row by its number, for messages; None: nothing is raised.
        numbers: of the rows.
    """
    if locate is None:
        return
    for number, row in zip(numbers, rows, strict=True):
        try:
            encode(task, processor, [row])
        except RefusedRow as error:
            raise InputError(placed(locate(number), str(error))) from error


def refuse_stream(rows: object, reader: str) -> None:
    """Raise InputError if `rows` are a stream, since `reader` needs the lengths of all rows."""
    if isinstance(rows, Stream):
        raise stream_refused(reader)


def stream_refused(reader: str) -> InputError:
    """Return the error for a stream, since `reader` needs the lengths of all rows."""
    return InputError(
        f"{reader} needs the lengths of all rows, which data.streaming=true does not read in "
        "advance: set data.streaming=false and data.train_rows=N"
    )


def encode(task: "Task[P]", processor: "P", rows: Sequence[Row]) -> list[Row]:
    """Encode rows with one call of `task.encode_rows`."""
    # encode_rows takes columns, as in Dataset.map
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    encoded = task.encode_rows(processor, columns)
    rows_of_values = zip(*encoded.values(), strict=True)
    return [dict(zip(encoded, values, strict=True)) for values in rows_of_values]


@dataclass(frozen=True)
class RawData:
    """Checked rows that the task has not encoded yet.

    Each task's docstring names the columns of its rows.

    Attributes:
        format: in which format the rows were; "" if settings name all columns.
        skipped: rows that were left out since they cannot be used, by split.
        near_duplicates: similarity from which on a test row is nearly a training row; None: none.
        sets: names of the sets of a mixture, whose rows have the number of theirs.
        origins: the parts of each split, training and test, in its order; {}: unknown.
    """

    task: "Task"
    train: "Dataset | Stream"
    test: "Dataset"
    name: str
    format: str = ""
    skipped: Mapping[str, Sequence[FaultyRow]] = field({})
    near_duplicates: float | None = None
    sets: Sequence[str] = ()
    origins: Mapping[str, Sequence["Origin"]] = field({})


@dataclass(kw_only=True)
class Source(ABC):
    """Settings that all data sources share; each value of `data.source` has a subclass."""

    serves: ClassVar[tuple[str, ...]] = ("classification", "causal_lm")

    name: str
    source: str
    task: str = "classification"
    train_rows: int | None = field(None, integer(1))  # None: all
    test_rows: int | None = field(None, integer(1))
    # of the shuffle that precedes holding out and limiting rows
    seed: int = field(13, integer(0, 2**32 - 1))
    # of the train rows: by_class, or None: shuffled in each epoch
    order: str | None = field(None, one_of(BY_CLASS))
    # which rows an epoch visits: balanced, of all classes equally many; None: each row once
    sampling: str | None = field(None, one_of(BALANCED))
    # with by_class: passes over the rows of a class; None: 1
    stream_repeats: int | None = field(None, integer(1))
    allow_overlap: bool = False  # a test set that is mostly training rows
    # texts that become tokens of their own, whose rows of the embedding train
    new_tokens: list[str] | None = field(None, NEW_TOKENS)
    # similarity of test rows and training rows from which on they are counted too, by MinHash
    near_duplicates: float | None = field(None, bounded(gt=0, lt=1))

    def __post_init__(self) -> None:
        if self.task not in self.serves:
            raise InputError(
                f"data.task={self.task}, but data {self.name} is for {' or '.join(self.serves)}"
            )
        check_rules(self, "data")
        if self.new_tokens is not None and self.task in NO_TEXT:
            raise InputError(
                f"data.new_tokens={self.new_tokens} are for rows of text, and data.task="
                f"{self.task} has no tokenizer: leave data.new_tokens out"
            )
        if self.sampling == BALANCED and self.order is not None:
            raise InputError(
                f"data.sampling={BALANCED} and data.order={self.order} both say which rows a step "
                "has: give one of them"
            )
        if self.stream_repeats is not None and self.order is None:
            raise InputError(
                f"data.stream_repeats={self.stream_repeats} needs data.order={BY_CLASS}, the order "
                "of which it repeats each class"
            )

    @classmethod
    def completed(cls, settings: Mapping[str, object]) -> dict[str, object]:
        """Return the settings under `data` with those that a configuration they name has."""
        return dict(settings)

    def check(self) -> None:
        """Raise InputError if files that the settings name are missing; no row is read."""
        return  # a source of a package has none

    def check_columns(self) -> None:
        """Raise InputError if the first row of a local file lacks a column that settings name."""
        return

    def check_rows(self) -> None:
        """Raise InputError if rows that are soon read have faults; imports no torch."""
        return

    def sample(self, split: str, count: int) -> list[int]:
        """The rows of a split, train or test, in random order, as many as the settings ask for.

        Args:
            count: of its rows; they are shuffled before they are limited.

        Raises:
            InputError: there are fewer rows than the settings ask for.
        """
        setting = f"{split}_rows"
        return limited(shuffled(count, self.seed), getattr(self, setting), setting)

    @abstractmethod
    def read(self) -> RawData:
        """Read the rows of this source and build the task.

        Raises:
            InputError: the rows cannot be read, or do not match the settings.
        """


@dataclass(kw_only=True)
class TextSource(Source, ABC):
    """Settings that all text sources share."""

    # tokens of a row; longer rows are truncated
    max_length: int = field(128, integer(2))


def read_data(cfg: DictConfig | Mapping[str, object]) -> RawData:
    """Read the task with its training and test rows, after a check of the settings `cfg`.

    Raises:
        InputError: a setting or a row is wrong.
    """
    return read_from(data_source(cfg))


def read_from(source: Source) -> RawData:
    """Read the rows of a source, with what its settings say of all of them.

    Raises:
        InputError: as `Source.read`.
    """
    data = source.read()
    if source.new_tokens is not None:
        data.task.new_tokens = source.new_tokens
    return replace(data, near_duplicates=source.near_duplicates)


def as_dataset(data: RawData, max_rows: int) -> "Dataset":
    """The train rows; of a stream its first `max_rows` rows."""
    return data.train.first_rows(max_rows) if isinstance(data.train, Stream) else data.train


def data_source(cfg: DictConfig | Mapping[str, object]) -> Source:
    """Return the checked settings under `data`; no row is read.

    Raises:
        InputError: an unknown source, task or setting, or a value out of range.
    """
    # a plain dict: sources are dataclasses, which take no DictConfig
    settings = plain(cfg)
    return read_fields(source_class(settings), settings, "data")


def source_class(settings: Mapping[str, object]) -> type[Source]:
    """Return the class of the source that settings under `data` name.

    Raises:
        InputError: an unknown source or task.
    """
    source = settings.get("source")
    if source is None:
        raise InputError(f"data.source is not given; available: {', '.join(sorted(SOURCES))}")
    place = choose(SOURCES, source, "data source")
    # before the fields: which are allowed depends on the task
    choose(TASKS, settings.get("task", "classification"), "task")
    return resolve_name(place)


def check_early(cfg: DictConfig | Mapping[str, object]) -> None:
    """Check the data of a run as far as it needs no torch: names, files, columns and rows.

    Raises:
        InputError: as `data_source`, `look_up` or `look_up_sets`.
    """
    settings = plain(cfg)
    if settings.get("task") is not None:
        settings = resolve_name("petl.data.objectives:with_objective")(settings)
        resolve_name("petl.data.objectives:reward_function")(
            settings["task"].get("reward", "exact")
        )
    import_modules(settings.get("imports"))  # which may add sources and tasks
    data, method = settings.get("data"), settings.get("method")
    # the run checks what is not a group, and data that get settings from a method of several tasks
    if not isinstance(data, Mapping) or (isinstance(method, Mapping) and method.get("tasks")):
        return
    if data.get("source") in SEVERAL:
        resolve_name("petl.data.named_sets:look_up_sets")(data)
    else:
        look_up(data_source(data))


def look_up(source: Source) -> None:
    """Look up files, columns and rows of a source as far as it needs no torch.

    Raises:
        InputError: as its `check`, `check_columns` and `check_rows`.
    """
    source.check()
    level = READING.level
    READING.setLevel(logging.ERROR)  # the run says how it reads the files
    try:
        source.check_columns()
        source.check_rows()
    finally:
        READING.setLevel(level)


def shuffled(count: int, seed: int) -> list[int]:
    """A permutation of the numbers below `count` that depends on `seed` alone."""
    # numpy's legacy generator: its stream is frozen, so that baselines keep their rows with any
    # version of numpy
    return np.random.RandomState(seed).permutation(count).tolist()


def limited(rows: list[T], count: int | None, setting: str) -> list[T]:
    """The first `count` of `rows`; all of them for None.

    Raises:
        InputError: there are fewer rows than the setting asks for.
    """
    if count is not None and count > len(rows):
        raise InputError(f"data.{setting}={count} is more than the {len(rows)} rows there are")
    return rows[:count]


def train_test_split(rows: list[T], source: Source) -> tuple[list[T], list[T]]:
    """Split data that come without test rows into training and test rows.

    The test rows are the first of the shuffled order, a fifth of all where `test_rows` is null, so
    that they do not depend on the number of training rows.

    Raises:
        InputError: fewer rows than are asked for, or none to train on.
    """
    # test rows first: a change of train_rows then leaves them as they are
    order = [rows[i] for i in shuffled(len(rows), source.seed)]
    test_rows = len(rows) // 5 if source.test_rows is None else source.test_rows
    test = limited(order, test_rows, "test_rows")
    if len(test) == len(order):
        raise InputError(
            f"data.test_rows={test_rows} leaves none of the {len(order)} rows to train on"
        )
    return limited(order[test_rows:], source.train_rows, "train_rows"), test


def held_rows(count: int, fraction: float, origin: str) -> int:
    """How many of `count` rows a `fraction` is: at least one, also of small data.

    Raises:
        InputError: no row would be left to train on.
    """
    test_rows = max(1, round(fraction * count))
    if test_rows >= count:
        raise InputError(
            f"{origin} has {count} rows, too few to hold out {fraction:.0%} "
            "of them: give data.test=..., or more rows"
        )
    return test_rows


def hold_out(
    count: int, fraction: float, seed: int, origin: str, keys: Sequence[str] = ()
) -> tuple[list[int], list[int]]:
    """Split the numbers below `count` at random: to train on, and `fraction` of them to test on.

    Args:
        keys: of the rows; those with the same one are on one side, unless there are but few keys.
            Empty: all differ.

    Raises:
        InputError: no row would be left to train on.
    """
    test_rows = held_rows(count, fraction, origin)
    order = shuffled(count, seed)
    if not keys:
        return order[test_rows:], order[:test_rows]
    sizes, held, taken = Counter(keys), set[str](), 0
    # a key of too many rows stays on the side of training, if there is another
    most = max(2 * test_rows, min(sizes.values()))
    for i in order:
        if taken < test_rows and keys[i] not in held and sizes[keys[i]] <= most:
            held.add(keys[i])
            taken += sizes[keys[i]]
    if taken > count / 2:  # hardly more than one key, whose rows are then on both sides
        return order[test_rows:], order[:test_rows]
    return [i for i in order if keys[i] not in held], [i for i in order if keys[i] in held]
