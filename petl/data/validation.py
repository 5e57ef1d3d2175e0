"""Rows as somebody wrote them, and the checks that make them rows to learn from."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from datasets import Dataset

from petl.errors import InputError, did_you_mean

T = TypeVar("T")
Row = dict[str, Any]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Rows with the numbers by which their author finds them."""

    origin: str  # the file, or the name and split on the hub
    unit: str  # what the numbers count: "line", "item", "row"
    numbers: Sequence[int]
    values: list[dict[str, Any]] | Dataset
    classes: list[str] | None = None  # names of integer labels, where the origin gives them

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, picked: list[int]) -> "Rows":
        """The rows at these places, in this order."""
        numbers = [self.numbers[i] for i in picked]
        if isinstance(self.values, Dataset):
            values: list[dict[str, Any]] | Dataset = self.values.select(picked)
        else:
            values = [self.values[i] for i in picked]
        return Rows(self.origin, self.unit, numbers, values, self.classes)

    def column(self, name: str, parse: Callable[[Any], T]) -> list[T]:
        """A column through `parse`, whose ValueError says what is wrong with a value.

        Raises:
            InputError: some value is wrong; the message names the first and counts them.
        """
        return self.through(lambda row: read(row, name, parse), [name])

    def through(self, convert: Callable[[Row], T], columns: list[str]) -> list[T]:
        """All rows through `convert`, whose ValueError says what is wrong with a row.

        Raises:
            InputError: some row is wrong; the message names the first and counts them.
        """
        values = self.values
        if isinstance(values, Dataset):
            values = values.select_columns(columns)
        found, faults = [], []
        for number, row in zip(self.numbers, values, strict=True):
            try:
                found.append(convert(row))
            except ValueError as error:
                faults.append((number, str(error)))
        if faults:
            number, fault = min(faults)
            more = f" (as in {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise InputError(f"{self.origin}, {self.unit} {number}: {fault}{more}")
        return found


@dataclass(frozen=True)
class PassingRows:
    """Rows that are read anew whenever they are asked for, one at a time.

    Attributes:
        origin: the file, or the name and split on the hub.
        read: reads at least the columns it is given; of each row, where it stands and the row.
        most: rows that there are at most; None: all that are read.
        classes: names of integer labels, where the origin gives them.
    """

    origin: str
    read: Callable[[Sequence[str]], Iterator[tuple[str, Row]]]
    most: int | None = None
    classes: list[str] | None = None

    def column(self, name: str, parse: Callable[[Any], T]) -> Iterator[T]:
        """A column through `parse`, as `through`."""
        logger.info("reading column %s of %s, once before training", name, self.origin)
        return self.through(lambda row: read(row, name, parse), [name])

    def through(self, convert: Callable[[Row], T], columns: Sequence[str]) -> Iterator[T]:
        """The rows through `convert`, whose ValueError says what is wrong with a row.

        Raises:
            InputError: a row is wrong, when it is reached; the message names it.
        """
        for place, row in islice(self.read(columns), self.most):
            try:
                yield convert(row)
            except ValueError as error:
                raise InputError(f"{place}: {error}") from error


def read(row: Row, column: str, parse: Callable[[Any], T]) -> T:
    """A value of a row through `parse`; its ValueError then begins with the column's name."""
    try:
        return parse(row[column])
    except ValueError as error:
        raise ValueError(f"{column} {error}") from error


def require(columns: Sequence[str], there: Iterable[str], origin: str) -> None:
    """Raises an InputError that names the columns there are when one is lacking."""
    names = list(there)
    for column in columns:
        if column not in names:
            listed = ", ".join(names) or "none"
            hint = did_you_mean(column, names) if len(names) > 1 else ""
            hint = hint if hint.startswith("; did") else ""
            raise InputError(f"{origin} has no column {column!r}, only {listed}{hint}")


def passage(value: Any) -> str:
    """A text, perhaps an empty one."""
    if value is None:
        raise ValueError("is missing")
    if not isinstance(value, str):
        raise ValueError(f"is {shown(value)}, not text")
    return value


def text(value: Any) -> str:
    """A text with something in it."""
    if not passage(value).strip():
        raise ValueError("is empty")
    return value


def label(value: Any) -> str:
    """The name of a class, which may be given as a string, an integer or a truth value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps is read as floats
    if not isinstance(value, str | int):
        raise ValueError(f"is {shown(value)}, not the name or number of a class")
    name = str(value).strip()
    if not name:
        raise ValueError("is empty")
    return name


def number(value: Any) -> float:
    """A number, which a csv file has as a string."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if math.isfinite(found):
            return found
    raise ValueError("is missing" if value in (None, "") else f"is {shown(value)}, not a number")


def items(parse: Callable[[Any], T]) -> Callable[[Any], list[T]]:
    """Reads a list, each item through `parse`; in a csv file its items stand between spaces."""

    def read_items(value: Any) -> list[T]:
        values = value.split() if isinstance(value, str) else value
        if not isinstance(values, list) or not values:
            raise ValueError("is missing" if value is None else f"is {shown(value)}, not a list")
        found = []
        for i, one in enumerate(values, start=1):
            try:
                found.append(parse(one))
            except ValueError as error:
                raise ValueError(f"has item {i} that {error}") from error
        return found

    return read_items


def numbered(classes: list[str]) -> Callable[[Any], str]:
    """Reads labels that are numbers into `classes`."""

    def name(value: Any) -> str:
        if value is None or value == -1:
            raise ValueError("is not given; choose a split whose rows have labels")
        if not isinstance(value, int) or not 0 <= value < len(classes):
            raise ValueError(f"is {value!r}, not a number below {len(classes)}")
        return classes[value]

    return name


def conversation(value: Any) -> list[dict[str, str]]:
    """Turns with `role` and `content`, other keys left out."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"is {shown(value)}, not a list of turns with role and content")
    for i, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"has {shown(turn)} as turn {i}, not an object with role and content")
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"has turn {i} with content {shown(turn.get('content'))}, not text")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise ValueError(f"has a tool call in turn {i}; only text is learned from")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def shown(value: Any, length: int = 60) -> str:
    """A value for a message, cut when it is long."""
    words = repr(value)
    return words if len(words) <= length else words[:length] + "..."
