"""Raw rows of a source with their line numbers, and checks of their values."""

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from petl.errors import InputError, did_you_mean, shown

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
Row = dict[str, Any]
# numbered rows; an error in place of a row that cannot be read
Table = Iterator[tuple[int, Row | ValueError]]
# what `Choose` may return as well: a column with the folder of the file that a row is from
FOLDER = "(folder)"
# the columns to read of those that are present; raises InputError, which names the origin, if one
# is missing
Choose = Callable[[Iterable[str], str], list[str]]
logger = logging.getLogger(__name__)


def placed(place: str, reason: str) -> str:
    """The message about a row: its place, and what it lacks or what is wrong with it."""
    return f"{place} {reason}" if reason.startswith("has no ") else f"{place}: {reason}"


class RefusedRow(InputError):
    """A row that a task cannot encode, such as a conversation that a chat template refuses."""


class FaultyRow(NamedTuple):
    """A row that cannot be used.

    Attributes:
        number: its position in the origin.
        place: the same for messages: "a.csv, line 3".
        values: its columns; None if it could not be read.
    """

    number: int
    place: str
    reason: str
    values: Row | None = None


@dataclass(frozen=True)
class SourceRows:
    """Raw rows in memory, with the numbers that messages name them by.

    Attributes:
        origin: the files, or the name and split on the Hub.
        numbers: positions of the rows in the origin, before any shuffle.
        locate: gives the location of the row at a position, for messages: "a.csv, line 3".
        classes: names of integer labels, if the origin has them.
        whole: starts an iterator over rows of the origin with all of their columns, for messages.
        unread: rows of the origin that could not be read.
    """

    origin: str
    numbers: Sequence[int]
    values: "list[Row] | Dataset"
    locate: Callable[[int], str]
    classes: list[str] | None = None
    whole: Callable[[], Iterable[Row]] | None = None
    unread: Sequence[FaultyRow] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, indices: list[int]) -> "SourceRows":
        """The rows at these indices, in this order."""
        numbers = [self.numbers[i] for i in indices]
        given = self.values
        is_list = isinstance(given, list)
        values = [given[i] for i in indices] if is_list else given.select(indices)
        return replace(self, numbers=numbers, values=values)

    def column(self, name: str, parse: Callable[[object], T]) -> list[T]:
        """Apply `parse` to the values of a column, without those that are not valid.

        It raises ValueError for an invalid value; `usable` reports the rows that have one.

        Raises:
            InputError: no value is valid; the message names the first.
        """
        values = self.values
        if not isinstance(values, list):
            # other columns may be long texts, which would be decoded
            values = values.select_columns([name])
        parsed, first = [], None
        for number, row in zip(self.numbers, self.rows(values), strict=True):
            try:
                parsed.append(read(row, name, parse))
            except ValueError as error:
                first = first or InputError(f"{self.locate(number)}: {error}, as in all rows")
        if first is not None and not parsed:
            raise first
        return parsed

    def usable(self, convert: Callable[[Row], Row]) -> "tuple[SourceRows, list[FaultyRow]]":
        """Apply `convert` to all rows; it raises ValueError for an invalid row.

        Returns:
            The converted rows, and those that are not valid or could not be read.
        """
        numbers, converted, faulty = [], [], list(self.unread)
        for number, row in zip(self.numbers, self.rows(self.values), strict=True):
            try:
                converted.append(convert(row))
                numbers.append(number)
            except ValueError as error:
                faulty.append(FaultyRow(number, self.locate(number), str(error), row))
        # rows may be shuffled; messages name lines in order
        faulty.sort(key=lambda row: row.number)
        return replace(self, numbers=numbers, values=converted, unread=()), faulty

    def rows(self, values: "list[Row] | Dataset") -> Iterator[Row]:
        """Yield values as rows."""
        return map(from_table, values) if not isinstance(values, list) else iter(values)


@dataclass(frozen=True)
class LazySourceRows:
    """Raw rows that are read from the source in each iteration, one at a time.

    Attributes:
        origin: the files, or the name and split on the Hub.
        read: starts an iterator over the columns that its argument chooses, which yields the
            location of a row, for messages, and the row.
        max_rows: number of rows after which an iteration ends; None: all rows.
        classes: names of integer labels, if the origin has them.
        whole: as in `SourceRows`.
    """

    origin: str
    read: Callable[[Choose], Iterator[tuple[str, Row]]]
    max_rows: int | None = None
    classes: list[str] | None = None
    whole: Callable[[], Iterable[Row]] | None = None

    def locate(self, number: int) -> str:
        """The location of a row, for messages: the rows up to it are read again."""
        location, _ = next(islice(self.read(every), number, None))
        return location

    def column(self, name: str, parse: Callable[[object], T]) -> Iterator[T]:
        """Yield the values of a column after `parse`; errors as in `map`."""
        logger.info("reading column %s of %s, once before training", name, self.origin)
        return self.map(lambda row: read(row, name, parse), partial(require, [name]))

    def map(self, convert: Callable[[Row], T], choose: Choose) -> Iterator[T]:
        """Yield the rows after `convert`, which raises ValueError for an invalid row.

        Raises:
            InputError: when a row that is not valid is reached; the message names it.
        """
        for location, row in islice(self.read(choose), self.max_rows):
            try:
                yield convert(row)
            except ValueError as error:
                raise InputError(f"{location}: {error}") from error


def from_table(row: Row) -> Row:
    """A row of a table of Arrow, whose objects have all keys of any row, without those it lacks."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        sample = next((each for each in value if each is not None), None)  # all have one type
        if isinstance(sample, dict | list):
            return [_without_nulls(each) for each in value]
    return value


def nested(values: Mapping[str, object], path: str) -> object:
    """The value at a path with dots in objects inside objects; None if there is none."""
    found: object = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def with_paths(names: Iterable[str], values: Mapping[str, object]) -> list[str]:
    """The names of columns, and the paths with dots of what is in objects inside them."""
    inner = [
        f"{name}.{path}"
        for name, value in values.items()
        if isinstance(value, Mapping)
        for path in with_paths(value, value)
    ]
    return [*names, *inner]


def without_paths(names: Collection[str]) -> list[str]:
    """The names of columns, without paths into objects in others of them."""
    return [name for name in names if "." not in name or name.partition(".")[0] not in names]


def read(row: Row, column: str, parse: Callable[[object], T]) -> T:
    """Apply `parse` to a value of a row.

    Raises:
        ValueError: the value is not valid; the message begins with the name of the column.
    """
    try:
        return parse(row[column])
    except ValueError as error:
        raise ValueError(f"{column} {error}") from error


def require(
    columns: Sequence[str], present: Iterable[str], origin: str, hint: str | None = None
) -> list[str]:
    """Return `columns`, without repetitions, after a check that all are present.

    Args:
        present: the names of all columns.
        origin: of them, for the message.
        hint: ends the message; None: a similar name, if there is one.

    Raises:
        InputError: one of `columns` is not present; the message names those that are.
    """
    names = list(present)
    for column in columns:
        if column not in names:
            listed = ", ".join(names) or "none"
            hint = similar(column, names) if hint is None else hint
            raise InputError(f"{origin} has no column {column!r}; available: {listed}{hint}")
    return list(dict.fromkeys(columns))


def similar(column: str, names: Sequence[str]) -> str:
    """The end of a message about a missing column: a similar name; "" if there is none."""
    hint = did_you_mean(column, names) if len(names) > 1 else ""
    # without a similar name it lists all, which the message does already
    return hint if hint.startswith("; did") else ""


def every(present: Iterable[str], origin: str) -> list[str]:
    """Choose all columns."""
    return list(present)


def passage(value: object) -> str:
    """Check a text, which may be empty."""
    if value is None:
        raise ValueError("is missing")
    if not isinstance(value, str):
        raise ValueError(f"is {shown(value)}, not text")
    return value


def text(value: object) -> str:
    """Check a text that is not blank."""
    found = passage(value)
    if not found.strip():
        raise ValueError("is empty")
    return found


def label(value: object) -> str:
    """The name of a class that is given as a string, an integer or a boolean."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with missing values is read as floats
    if not isinstance(value, str | int):
        several = "; several classes in a row are for data.task=multi_label"
        hint = several if isinstance(value, list) else ""
        raise ValueError(f"is {shown(value)}, not the name or number of a class{hint}")
    name = str(value).strip()
    if not name:
        raise ValueError("is empty")
    return name


TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def truth(value: object) -> bool:
    """Whether a value of a column of 0 or 1, true or false, yes or no is the first of these."""
    found = TRUTHS.get(label(value).lower())
    if found is None:
        raise ValueError(f"is {shown(value)}, not 0 or 1")
    return found


def number(value: object) -> float:
    """Convert a number, which is a string in a csv file, to a finite float."""
    # bool is an int in Python
    if isinstance(value, str | int | float | Decimal) and not isinstance(value, bool):
        try:
            converted = float(value)
        except (ValueError, OverflowError):
            converted = math.nan
        if math.isfinite(converted):
            return converted
    if value in (None, ""):
        raise ValueError("is missing")
    is_comma = isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]*,[\d.,]*", value.strip())
    hint = ": write a decimal point, and no other comma" if is_comma else ""
    raise ValueError(f"is {shown(value)}, not a number{hint}")


def numbered(classes: list[str]) -> Callable[[object], str]:
    """A parser of labels that are indices of `classes`; it returns the name of the class."""

    def name(value: object) -> str:
        if value is None or value == -1:  # the convention of test splits on the Hub
            raise ValueError(f"is {value}, no label: choose a split whose rows have labels")
        if not isinstance(value, int) or not 0 <= value < len(classes):
            raise ValueError(f"is {value!r}, not an integer from 0 to {len(classes) - 1}")
        return classes[value]

    return name
