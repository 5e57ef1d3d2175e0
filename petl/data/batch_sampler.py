"""Batch samplers: the rows of each optimizer step, the same for any number of processes.

Epoch e visits the train rows in an order drawn from the seed and e alone. Step s takes the next
`batch_size` of them: each of n processes takes every n-th row of the step and divides its rows into
micro-batches. So one process with accumulation and several processes see the same steps, and a run
resumes at any step without visiting the steps before it.

With `train.buckets` or `train.batch_sizes` the rows of a step are of similar length, the longest
first, so that processes get equal work and micro-batches little padding; the order of rows and of
steps is random as before.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

Ints = NDArray[Any]  # of integers


class StepBuckets(Protocol):
    """What a step sampler needs of buckets, see `petl.data.buckets.Buckets`."""

    @property
    def sizes(self) -> Ints:
        """Rows of each step of an epoch, before the steps are permuted."""

    def step_order(self, seed: int, epoch: int) -> Ints:
        """The order in which an epoch visits the steps."""

    def batches(self, seed: int, epoch: int) -> Iterator[Ints]:
        """The rows of each step of an epoch."""


class Mixture(Protocol):
    """What a step sampler needs of a mixture, see `petl.data.task_mixture.TaskMixture`."""

    def order(self, seed: int, epoch: int) -> list[int]:
        """The rows that an epoch visits, as many as there are; some twice, some not."""


@dataclass(frozen=True)
class StepSampler:
    """The rows of each step, for process `rank` of `processes`.

    A batch sampler for DataLoader: iterating yields the micro-batches of all steps after `done`,
    one after the other; a step has `num_micro_batches` of them.

    Attributes:
        rows: number of train rows.
        batch_size: rows of a step, over all processes.
        micro_batch_size: rows of a forward pass; None: all that a process has of a step.
        steps: optimizer steps of the run.
        done: steps that are over, when a run resumes.
    """

    rows: int
    batch_size: int
    micro_batch_size: int | None
    steps: int
    seed: int
    done: int = 0
    rank: int = 0
    processes: int = 1
    buckets: StepBuckets | None = None  # if given, determines how many rows a step has
    mixture: Mixture | None = None  # if given, determines which rows an epoch visits

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer rows."""
        if self.buckets is not None:
            return len(self.buckets.sizes)
        return math.ceil(self.rows / self.batch_size)

    def global_batches(self) -> Iterator[list[int]]:
        """The rows of each step after `done`, over all processes."""
        batches: list[list[int]] = []
        for step in range(self.done, self.steps):
            # with `done`, the first epoch is entered in the middle
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0 or not batches:
                batches = self.epoch(epoch)
            yield batches[index]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch, counted from 0."""
        if self.buckets is not None:
            return [rows.tolist() for rows in self.buckets.batches(self.seed, epoch)]
        if self.mixture is not None:
            return chunks(self.mixture.order(self.seed, epoch), self.batch_size)
        return chunks(permutation(self.rows, self.seed, epoch), self.batch_size)

    def micro_batches(self, batch: list[int]) -> list[list[int]]:
        """This process's micro-batches of one step, as many as every other process has.

        A process with too few rows gets the first row of the step as filler, to which the loop must
        give no weight (`num_spare_micro_batches`): methods may communicate between processes in
        each forward pass, so all processes need the same number of passes.
        """
        # every n-th row: with buckets rows are sorted, and so each process gets long and short ones
        own_rows = batch[self.rank :: self.processes]
        micro_batches = chunks(own_rows, self.micro_batch_size or max(1, len(own_rows)))
        needed = self._micro_batches_for(math.ceil(len(batch) / self.processes))
        return micro_batches + [batch[:1]] * (needed - len(micro_batches))

    def num_spare_micro_batches(self, step: int) -> int:
        """How many of this process's micro-batches of step `step`, from 1, get no weight.

        They are the last ones of the step.
        """
        # number of rows rank, rank + processes, ... below the size of the step
        own_rows = math.ceil(max(0, self.size(step) - self.rank) / self.processes)
        return self.num_micro_batches(step) - self._micro_batches_for(own_rows)

    def size(self, step: int) -> int:
        """Rows of step `step`, from 1, over all processes; the last of an epoch may be short."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)  # steps count from 1
        if self.buckets is not None:
            return int(self.buckets.sizes[self.buckets.step_order(self.seed, epoch)[index]])
        # the last step of an epoch has the remaining rows
        return min(self.batch_size, self.rows - index * self.batch_size)

    def num_micro_batches(self, step: int) -> int:
        """Number of micro-batches that each process computes in step `step`, from 1."""
        return self._micro_batches_for(math.ceil(self.size(step) / self.processes))

    def _micro_batches_for(self, rows: int) -> int:
        return math.ceil(rows / (self.micro_batch_size or max(1, rows)))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            yield from self.micro_batches(batch)


@dataclass(frozen=True)
class SequentialStepSampler(StepSampler):
    """A step sampler that visits streamed rows in order; the run is its only epoch."""

    def global_batches(self) -> Iterator[list[int]]:
        """The rows of each step after `done`, in ascending order."""
        size = self.batch_size
        for step in range(self.done, self.steps):
            yield list(range(step * size, (step + 1) * size))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A random generator that depends on the arguments alone."""
    # different for all seeds and all epochs below the factor
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def random_permutation(count: int, generator: torch.Generator) -> Ints:
    """The numbers below `count` in random order, int64."""
    return torch.randperm(count, generator=generator).numpy()


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """A random order of `count` rows that depends on the arguments alone."""
    return random_permutation(count, epoch_generator(seed, epoch)).tolist()


def chunks(order: list[int], size: int) -> list[list[int]]:
    """Consecutive pieces of `size` rows; the last may be shorter."""
    return [order[i : i + size] for i in range(0, len(order), size)]
