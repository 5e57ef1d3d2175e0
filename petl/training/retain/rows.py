"""Retained rows: what is measured, and which process measures it; without what measures."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from petl.core.registry import keeps_base
from petl.core.spec.facts import facts_of
from petl.errors import InputError
from petl.system.collectives import gathered

# entries of scores.json; the second of methods that do not start as the base, such as binary
KEY, AT_START = "retained", "retained_at_start"
CURVE = {"language": "retained_lost", "features": "retained_drift"}  # names in logs
logger = logging.getLogger(__name__)
Found = TypeVar("Found")


class RetainedRow(NamedTuple):
    """A text and its tokens."""

    text: str
    ids: list[int]


class Processor(Protocol):
    """What is used of a processor for images and text."""

    tokenizer: PreTrainedTokenizerBase


def tokenizer_of(given: PreTrainedTokenizerBase | Processor) -> PreTrainedTokenizerBase:
    """Return a tokenizer, or that of a processor for images and text."""
    return given if isinstance(given, PreTrainedTokenizerBase) else given.tokenizer


def longest_for(
    tokenizer: PreTrainedTokenizerBase | Processor, max_length: int, positions: int | None
) -> int:
    """Return `max_length`, or what a model reads at most.

    Args:
        positions: that the model has; None: any number.
    """
    most = min(tokenizer_of(tokenizer).model_max_length, positions or max_length)
    if most < max_length:
        logger.info(
            "retained texts are cut to the %d tokens that the model reads, not to %d",
            most,
            max_length,
        )
    return min(most, max_length)


@dataclass(frozen=True)
class Processes:
    """The processes among which rows are divided; all run the same number of passes.

    Attributes:
        rank: of this one, below `count`.
    """

    rank: int = 0
    count: int = 1

    def own(self, order: Sequence[int]) -> list[int]:
        """Return this process's part of some rows, as many as every other has."""
        each = -(-len(order) // self.count)
        # every n-th one: those of a batch then have similar lengths in all of them
        mine = [*order[self.rank :: self.count]]
        # a row that another process has, too: a sharded model needs all processes in each pass
        return mine + [order[0]] * (each - len(mine))

    def all(self, found: dict[int, Found]) -> dict[int, Found]:
        """Return what all processes have found, by row."""
        if self.count == 1:  # others may not be here
            return found
        merged: dict[int, Found] = {}
        for part in gathered(found):
            merged |= part
        return merged


ALONE = Processes()


def by_length(lengths: Sequence[int], batch_size: int, processes: Processes) -> list[list[int]]:
    """Return this process's rows in batches of similar lengths, so that little is padding.

    Raises:
        InputError: the size of a batch is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is below 1, the minimum")
    # the same division for the same rows, so that points of a curve can be compared
    order = processes.own(sorted(range(len(lengths)), key=lambda number: lengths[number]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def has_base(config: PeftConfig) -> bool:
    """Return True if a trained model without its adapter of this config is the pretrained one."""
    return keeps_base(config) and not facts_of(config).trains_biases
