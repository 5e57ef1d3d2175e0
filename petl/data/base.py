"""What every source of data shares: its settings, and how rows are shuffled, held out and cut."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from petl.errors import InputError
from petl.tasks import Task


@dataclass(frozen=True)
class RawData:
    """Checked rows before any tokenizer: `text` and `label` (a number), `text`, or `messages`."""

    task: Task
    train: Dataset
    test: Dataset
    name: str


@dataclass(kw_only=True)
class Source(ABC):
    """Settings that all data share; a subclass is one source and its file one `source:` word."""

    name: str
    source: str
    task: str = "classification"
    max_length: int = 128  # tokens of a row; longer ones are cut
    train_rows: int | None = None  # null: all
    test_rows: int | None = None
    seed: int = 13  # of the shuffle before rows are held out and cut

    def __post_init__(self) -> None:
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


def cut(rows: list[int], count: int | None, setting: str) -> list[int]:
    """The first `count` of `rows`; all of them for None."""
    if count is not None and count > len(rows):
        raise InputError(f"{setting}={count} is more than the {len(rows)} rows there are")
    return rows[:count]
