"""What every source of data shares: its settings, and how rows are shuffled and cut."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from datasets import Dataset

from petl.data.streaming import Stream
from petl.errors import InputError
from petl.tasks.base import Task

T = TypeVar("T")


@dataclass(frozen=True)
class RawData:
    """Checked rows before any processor has seen them, for the tasks to encode.

    Each task's docstring names the columns of its rows.
    """

    task: Task
    train: Dataset | Stream
    test: Dataset
    name: str


@dataclass(kw_only=True)
class Source(ABC):
    """Settings that all data share. A subclass is what one word after `source:` means."""

    serves: ClassVar[tuple[str, ...]] = ("classification", "causal_lm")

    name: str
    source: str
    task: str = "classification"
    train_rows: int | None = None  # None: all
    test_rows: int | None = None
    seed: int = 13  # of the shuffle before rows are held out and cut

    def __post_init__(self) -> None:
        if self.task not in self.serves:
            raise InputError(f"data.task={self.task}, but data {self.name} is {self.serves[0]}")
        for key, least in (("train_rows", 1), ("test_rows", 1), ("seed", 0)):
            check_least(key, getattr(self, key), least)
        if self.seed >= 2**32:
            raise InputError(f"data.seed={self.seed} is not below 2**32")

    @abstractmethod
    def read(self) -> RawData:
        """The rows of this source.

        Raises:
            InputError: they cannot be had, or are not what the settings say.
        """


@dataclass(kw_only=True)
class TextSource(Source, ABC):
    """Settings that all texts share."""

    max_length: int = 128  # tokens of a row; longer ones are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("max_length", self.max_length, 2)


def check_least(key: str, value: float | None, least: float) -> None:
    """Raise InputError if the setting `key` is below `least`."""
    if value is not None and value < least:
        raise InputError(f"data.{key}={value} is below {least}")


def check_share(share: float) -> None:
    """Raise InputError unless `test_share` leaves something on both sides."""
    if not 0 < share < 1:
        raise InputError(f"data.test_share={share} is not between 0 and 1")


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that depends on nothing but `seed`."""
    # numpy's legacy generator: its stream is frozen, so the rows of a baseline stay its rows
    return np.random.RandomState(seed).permutation(count).tolist()


def cut(rows: list[T], count: int | None, setting: str) -> list[T]:
    """The first `count` of `rows`; all of them for None."""
    if count is not None and count > len(rows):
        raise InputError(f"data.{setting}={count} is more than the {len(rows)} rows there are")
    return rows[:count]


def parted(rows: list[T], source: Source) -> tuple[list[T], list[T]]:
    """Rows to train on and to test on, of data that come in one piece.

    The test rows are the first of the shuffled order, a fifth of all where `test_rows` is null, so
    that they stay the same whatever the number of training rows.

    Raises:
        InputError: fewer rows than are asked for.
    """
    order = [rows[i] for i in shuffled(len(rows), source.seed)]
    held = len(rows) // 5 if source.test_rows is None else source.test_rows
    test = cut(order, held, "test_rows")
    return cut(order[held:], source.train_rows, "train_rows"), test


def hold_out(count: int, share: float, seed: int, origin: str) -> tuple[list[int], list[int]]:
    """Numbers below `count` in two parts, drawn by the seed: to train on, and `share` to test on.

    Raises:
        InputError: no row would be left to train on.
    """
    held = max(1, round(share * count))
    if held >= count:
        raise InputError(
            f"{origin} has {count} rows, too few to hold out {share:.0%} "
            "of them: give data.test=..., or more rows"
        )
    order = shuffled(count, seed)
    return order[held:], order[:held]
