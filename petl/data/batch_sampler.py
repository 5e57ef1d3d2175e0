"""Which rows meet in which optimizer step, the same for any number of processes.

Epoch e visits the train rows in an order drawn from the seed and e alone. Step s takes the next
`batch_size` of them, whoever computes them: each process takes every n-th row of the step and cuts
its share into micro-batches. So one process with accumulation and several processes see the same
steps, and a run resumes at any step without visiting those before it.

With `train.buckets` or `train.batch_sizes` the rows of a step are of similar length, the longest
first, so that shares are as heavy and micro-batches pad little; which rows and which steps come
when is drawn as before.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from petl.data.buckets import Buckets, drawing, permuted


@dataclass(frozen=True)
class StepSampler:
    """The rows of each step, for process `rank` of `processes`.

    A batch sampler for DataLoader: iterating gives the micro-batches of all steps after `done`, one
    after the other. `pieces` says how many of them a step has.
    """

    rows: int
    batch_size: int
    micro_batch_size: int | None
    steps: int
    seed: int
    done: int = 0
    rank: int = 0
    processes: int = 1
    buckets: Buckets | None = None  # they then decide how many rows a step has

    @property
    def steps_per_epoch(self) -> int:
        if self.buckets is not None:
            return len(self.buckets.sizes)
        return math.ceil(self.rows / self.batch_size)

    def global_batches(self) -> Iterator[list[int]]:
        """The rows of each step after `done`, over all processes."""
        batches: list[list[int]] = []
        for step in range(self.done, self.steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0 or not batches:
                batches = self.epoch(epoch)
            yield batches[index]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch, counted from 0."""
        if self.buckets is not None:
            return [rows.tolist() for rows in self.buckets.batches(self.seed, epoch)]
        return chunks(permutation(self.rows, self.seed, epoch), self.batch_size)

    def share(self, batch: list[int]) -> list[list[int]]:
        """This process's micro-batches of one step, as many as every other process has.

        Where its rows do not suffice it computes the first row of all instead, which must get no
        weight (`spares`): methods may exchange figures in each forward pass.
        """
        mine = batch[self.rank :: self.processes]
        pieces = chunks(mine, self.micro_batch_size or max(1, len(mine)))
        most = self.pieces_of(math.ceil(len(batch) / self.processes))
        return pieces + [batch[:1]] * (most - len(pieces))

    def spares(self, step: int) -> int:
        """How many of this process's micro-batches of step `step`, from 1, get no weight.

        They are the last ones.
        """
        mine = math.ceil(max(0, self.size(step) - self.rank) / self.processes)
        return self.pieces(step) - self.pieces_of(mine)

    def size(self, step: int) -> int:
        """Rows of step `step`, from 1, over all processes; the last of an epoch may be short."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        if self.buckets is not None:
            return int(self.buckets.sizes[self.buckets.step_order(self.seed, epoch)[index]])
        return min(self.batch_size, self.rows - index * self.batch_size)

    def pieces(self, step: int) -> int:
        """How many micro-batches each process computes in step `step`, from 1."""
        return self.pieces_of(math.ceil(self.size(step) / self.processes))

    def pieces_of(self, rows: int) -> int:
        return math.ceil(rows / (self.micro_batch_size or max(1, rows)))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            yield from self.share(batch)


@dataclass(frozen=True)
class SequentialStepSampler(StepSampler):
    """Of rows that are to be visited as they come; the run is its only epoch."""

    def global_batches(self) -> Iterator[list[int]]:
        size = self.batch_size
        for step in range(self.done, self.steps):
            yield list(range(step * size, (step + 1) * size))


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """An order of `count` rows that depends on nothing but the arguments."""
    return permuted(count, drawing(seed, epoch)).tolist()


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]
