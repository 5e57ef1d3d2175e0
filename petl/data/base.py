"""What every source of data shares: its settings, and how rows are shuffled and cut."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from datasets import Dataset

from petl.errors import InputError
from petl.tasks import Task

T = TypeVar("T")


@dataclass(frozen=True)
class RawData:
    """Checked rows before any tokenizer: `text` and `label` (a number), `text`, or `messages`."""

    task: Task
    train: Dataset
    test: Dataset
    name: str


@dataclass(kw_only=True)
class Source(ABC):
    """Settings that all data share. A subclass is what one word after `source:` means."""

    serves: ClassVar[tuple[str, ...]] = ("classification", "causal_lm")

    name: str
    source: str
    task: str = "classification"
    max_length: int = 128  # tokens of a row; longer ones are cut
    train_rows: int | None = None  # None: all
    test_rows: int | None = None
    seed: int = 13  # of the shuffle before rows are held out and cut

    def __post_init__(self) -> None:
        if self.task not in self.serves:
            raise InputError(f"data.task={self.task}, but data {self.name} is {self.serves[0]}")
        for key, least in (("max_length", 2), ("train_rows", 1), ("test_rows", 1), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise InputError(f"data.{key}={value} is below {least}")
        if self.seed >= 2**32:
            raise InputError(f"data.seed={self.seed} is not below 2**32")

    @abstractmethod
    def read(self) -> RawData:
        """The rows of this source.

        Raises:
            InputError: they cannot be had, or are not what the settings say.
        """


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that depends on nothing but `seed`."""
    # numpy's legacy generator: its stream is frozen, so the rows of a baseline stay its rows
    return np.random.RandomState(seed).permutation(count).tolist()


def cut(rows: list[T], count: int | None, setting: str) -> list[T]:
    """The first `count` of `rows`; all of them for None."""
    if count is not None and count > len(rows):
        raise InputError(f"data.{setting}={count} is more than the {len(rows)} rows there are")
    return rows[:count]
