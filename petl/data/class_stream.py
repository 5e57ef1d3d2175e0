"""The order of a class-incremental stream: the rows of one class after the other.

A stage has the rows of one class, in the order of the classes, `repeats` times; each pass over them
has a random order of its own. Nothing tells the model where a stage ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from petl.data.batch_sampler import Ints, chunks, epoch_generator, random_permutation


@dataclass(frozen=True)
class ClassStream:
    """The steps of a stream, in the form that `StepSampler` takes for `buckets`.

    Attributes:
        labels: class of each row, int.
        batch_size: rows of a step; the last step of a pass may have fewer.
        repeats: passes over the rows of a class, before the next class.
    """

    labels: Ints
    batch_size: int
    repeats: int
    is_stream: bool = True
    apart: int = 0

    @cached_property
    def stages(self) -> list[tuple[int, Ints]]:
        """Class and rows of each stage; a class without rows has none."""
        return [(int(label), np.flatnonzero(self.labels == label)) for label in self.classes]

    @property
    def classes(self) -> Ints:
        """The classes that have rows, in their order."""
        return np.unique(self.labels)

    @cached_property
    def sizes(self) -> Ints:
        """Rows of each step."""
        steps = [
            [len(part) for part in chunks(list(range(len(rows))), self.batch_size)] * self.repeats
            for _, rows in self.stages
        ]
        return np.concatenate(steps)

    @cached_property
    def ends(self) -> dict[int, int]:
        """The class of each stage, by the number of its last step, from 1."""
        lengths = [-(-len(rows) // self.batch_size) * self.repeats for _, rows in self.stages]
        ends = np.cumsum(lengths).tolist()
        return dict(zip(ends, (label for label, _ in self.stages), strict=True))

    def step_order(self, seed: int, epoch: int) -> Ints:
        """The steps in their order, which the classes give."""
        return np.arange(len(self.sizes))

    def batches(self, seed: int, epoch: int) -> Iterator[Ints]:
        """The rows of each step."""
        passes = [rows for _, rows in self.stages for _ in range(self.repeats)]
        for number, rows in enumerate(passes):
            generator = epoch_generator(seed, epoch * len(passes) + number)
            order = rows[random_permutation(len(rows), generator)]
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size]
