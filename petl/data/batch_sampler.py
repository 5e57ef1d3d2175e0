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
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from petl.errors import InputError

Ints = NDArray[Any]  # of integers
# assumptions of `Buckets.of_best_count`
WORTHWHILE = 0.02  # of the positions, for which rows are sorted more finely
MIN_STEPS = 3  # steps of a bucket in an epoch, over which its rows are shuffled
ENOUGH_STEPS = 16  # of an epoch; of fewer rows a step should have all kinds that there are
MAX_BUCKETS = 64  # beyond which next to nothing is padding


class StepOrder(Protocol):
    """The steps of an epoch: of buckets, or as a feature of a run orders the rows."""

    @property
    def repeats(self) -> int:
        """How often an epoch reads each row."""

    @property
    def is_stream(self) -> bool:
        """True if the run is one epoch, no part of which has rows of all kinds."""

    @property
    def apart(self) -> int:
        """How many rows, the last of each step, get forward passes of their own.

        Rows of another length than the others would pad them, or be padded.
        """

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


class Buckets:
    """Optimizer steps of rows of similar length, the same number in every epoch.

    Args:
        lengths: of the rows, [N], tokens.
        parts: for each bucket its rows by ascending length, and the number of rows of a step. The
            last step of a bucket may have fewer.

    Attributes:
        rows: row numbers of each bucket.
        steps: for each bucket the number of rows of a full step.
        sizes: number of rows of each step of an epoch before the steps are permuted, [S].
    """

    repeats, is_stream, apart = 1, False, 0

    def __init__(self, lengths: Ints, parts: Sequence[tuple[Ints, int]]) -> None:
        self.rows = [rows for rows, _ in parts]
        self.steps = [size for _, size in parts]
        self.sizes = np.concatenate([sizes_of_chunks(len(rows), size) for rows, size in parts])
        self._lengths = lengths
        self._order: tuple[tuple[int, int], Ints] | None = None

    @classmethod
    def of_equal_tokens(
        cls,
        lengths: Ints,
        count: int,
        batch_size: int,
        max_tokens: int | None = None,
        quadratic: float | None = None,
    ) -> "Buckets":
        """About `count` buckets of equal numbers of tokens, with full steps where possible.

        Rows are sorted by length; a bucket ends where it holds its part of all tokens, rounded to
        a multiple of the step size, so that rows of one length may be in two buckets. There are as
        many steps of `batch_size` rows as without buckets, and only the last step of the longest
        bucket may have fewer rows.

        Args:
            lengths: of the rows, [N], tokens.
            count: approximate number of buckets.
            batch_size: rows of a step.
            max_tokens: if given, replaces `batch_size`: the maximum number of positions of a step,
                its rows times the longest length of the bucket.
            quadratic: the length at which a row counts twice against `max_tokens`.

        Raises:
            InputError: a row is longer than `max_tokens`.
        """
        # int32 halves the memory of large data sets
        order = np.argsort(lengths, kind="stable").astype(np.int32)
        rising = effective(lengths[order], quadratic)
        longest = rising[-1]
        if max_tokens is not None and longest > max_tokens:
            counted = "" if quadratic is None else f" that train.quadratic={quadratic:g} counts"
            raise InputError(
                f"train.max_tokens={max_tokens} is less than the {longest:g} tokens{counted} of "
                "the longest row: raise it, or truncate rows with data.max_length"
            )

        def rows_of_step(stop: int) -> int:
            return batch_size if max_tokens is None else int(max_tokens // rising[stop - 1])

        sums = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
        parts: list[tuple[Ints, int]] = []
        start = 0
        while start < len(order):
            # where the bucket would hold 1 / count of all tokens
            stop = int(np.searchsorted(sums, sums[start] + sums[-1] / count))
            # the step size for the longest row of that bucket
            size = rows_of_step(max(start + 1, min(stop, len(order))))
            stop = min(start + size * max(1, round((stop - start) / size)), len(order))
            parts.append(
                (order[start:stop], rows_of_step(stop))
            )  # fewer if the bucket has grown by longer rows
            start = stop
        return cls(lengths, parts)

    @classmethod
    def of_best_count(
        cls,
        lengths: Ints,
        batch_size: int,
        max_tokens: int | None = None,
        quadratic: float | None = None,
    ) -> "Buckets":
        """As `of_equal_tokens`, with the fewest buckets (1, 2, 4 ...) that leave little padding.

        That is at most `WORTHWHILE` more positions than with the number that leaves fewest. Each
        bucket has about `MIN_STEPS` steps or more, so that the rows which meet in a step change
        from epoch to epoch. The number depends on lengths and sizes of steps alone.
        """
        limits = batch_size, max_tokens, quadratic
        found = [cls.of_equal_tokens(lengths, 1, *limits)]
        while (count := 2 ** len(found)) <= MAX_BUCKETS and (
            count * MIN_STEPS <= len(found[0].sizes)
        ):
            found.append(cls.of_equal_tokens(lengths, count, *limits))
        # of tokens, so that more is better
        useful = [1 - padding_fraction(lengths, each.batches(0, 0)) for each in found]
        enough = max(useful) / (1 + WORTHWHILE)
        return next(each for each, share in zip(found, useful, strict=True) if share >= enough)

    @classmethod
    def of_batch_sizes(cls, lengths: Ints, batch_sizes: Mapping[int, int]) -> "Buckets":
        """Buckets that end at given lengths, with a maximum number of rows in a step for each.

        The rows of a bucket are distributed evenly over the fewest steps that hold them.

        Args:
            lengths: of the rows, [N], tokens.
            batch_sizes: maximum rows of a step, by the longest length of a bucket.

        Raises:
            InputError: a row is longer than the last bucket allows.
        """
        bounds = sorted(batch_sizes)
        longest = int(lengths.max())
        if longest > bounds[-1]:
            raise InputError(
                f"train.batch_sizes ends at rows of {bounds[-1]} tokens, and the longest has "
                f"{longest}: search batch sizes again for these rows (`petl batch-sizes`) "
                "or truncate them with data.max_length"
            )
        order = np.argsort(lengths, kind="stable").astype(np.int32)
        parts: list[tuple[Ints, int]] = []
        for bound, rows in zip(bounds, split_by(bounds[:-1], lengths, order), strict=True):
            if len(rows):
                steps = math.ceil(len(rows) / batch_sizes[bound])
                parts.append((rows, math.ceil(len(rows) / steps)))
        return cls(lengths, parts)

    def largest_batch(self, max_rows: int | None = None, processes: int = 1) -> Ints:
        """The rows of the largest forward pass of one process: the longest of some bucket.

        Args:
            max_rows: rows of a forward pass; None: all that the process has of a step.
            processes: number of processes among which the rows of a step are divided.
        """
        per_process = [math.ceil(size / processes) for size in self.steps]
        candidates = [
            rows[-min(size, max_rows or size) :]
            for rows, size in zip(self.rows, per_process, strict=True)
        ]
        lengths = self._lengths
        return max(candidates, key=lambda r: (len(r) * int(lengths[r[-1]]), lengths[r[-1]]))

    def step_order(self, seed: int, epoch: int) -> Ints:
        """The order of the steps of `sizes` in this epoch, [S]."""
        if self._order is None or self._order[0] != (seed, epoch):
            order = random_permutation(len(self.sizes), epoch_generator(seed, epoch))
            self._order = (seed, epoch), order
        return self._order[1]

    def batches(self, seed: int, epoch: int) -> Iterator[Ints]:
        """Yield the rows of each step of this epoch, longest first.

        The steps of all buckets are mixed, so that lengths do not drift in the course of an epoch.
        """
        generator = epoch_generator(seed, -1 - epoch)  # independent of that of `step_order`
        steps: list[Ints] = []
        for rows, size in zip(self.rows, self.steps, strict=True):
            order = random_permutation(len(rows), generator)
            ends = range(size, len(rows), size)
            # rows are sorted by length, so that descending positions are descending lengths
            steps += [rows[np.sort(part)[::-1]] for part in np.split(order, ends)]
        return (steps[i] for i in self.step_order(seed, epoch))


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
    buckets: StepOrder | None = None  # if given, determines how many rows a step has
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
        found: list[list[int]] = []
        end = 0
        for size in self._parts(len(batch)):
            start, end = end, end + size
            # every n-th row: buckets are sorted, and so each process gets long and short ones
            own_rows = batch[start:end][self.rank :: self.processes]
            found += chunks(own_rows, self.micro_batch_size or max(1, len(own_rows)))
        return found + [batch[:1]] * (self._most_micro_batches(len(batch)) - len(found))

    def _parts(self, rows: int) -> list[int]:
        """The sizes of the parts of a step of so many rows, which share no forward pass."""
        apart = 0 if self.buckets is None else self.buckets.apart
        return [rows - apart, apart] if apart else [rows]

    def num_spare_micro_batches(self, step: int) -> int:
        """How many of this process's micro-batches of step `step`, from 1, get no weight.

        They are the last ones of the step.
        """
        # number of rows rank, rank + processes, ... below the size of each part
        own = [
            math.ceil(max(0, size - self.rank) / self.processes)
            for size in self._parts(self.size(step))
        ]
        return self.num_micro_batches(step) - sum(map(self._micro_batches_for, own))

    def size(self, step: int) -> int:
        """Rows of step `step`, from 1, over all processes; the last of an epoch may be short."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)  # steps count from 1
        if self.buckets is not None:
            return int(self.buckets.sizes[self.buckets.step_order(self.seed, epoch)[index]])
        # the last step of an epoch has the remaining rows
        return min(self.batch_size, self.rows - index * self.batch_size)

    def num_micro_batches(self, step: int) -> int:
        """Number of micro-batches that each process computes in step `step`, from 1."""
        return self._most_micro_batches(self.size(step))

    def _most_micro_batches(self, rows: int) -> int:
        """The micro-batches of the process that has most of a step of so many rows."""
        parts = (math.ceil(size / self.processes) for size in self._parts(rows))
        return sum(map(self._micro_batches_for, parts))

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


def effective(lengths: Any, quadratic: float | None) -> Any:
    """Lengths as counted against a token budget: l + l^2 / `quadratic`.

    The quadratic term is for attention, whose cost grows faster than the length.
    """
    if quadratic is None:
        return lengths
    return lengths + np.square(lengths, dtype=np.float64) / quadratic


def split_by(edges: Sequence[int], lengths: Ints, rows: Ints) -> list[Ints]:
    """Split `rows` into buckets, keeping their order.

    A length equal to an edge is in the lower bucket.
    """
    # side="left": a length equal to an edge is below it
    bucket = np.searchsorted(edges, lengths[rows], side="left")
    order = np.argsort(bucket, kind="stable")  # stable: keeps the order of rows within a bucket
    stops = np.searchsorted(bucket[order], np.arange(1, len(edges) + 1))
    return np.split(rows[order], stops)


def sizes_of_chunks(count: int, size: int) -> Ints:
    """Sizes of the chunks of `count` items: all `size`, and the last with the remainder."""
    sizes = np.full(math.ceil(count / size), size, np.int32)
    sizes[-1] = count - size * (len(sizes) - 1)
    return sizes


def padding_fraction(lengths: Ints, batches: Iterable[Sequence[int] | Ints]) -> float:
    """Fraction of positions that are padding when each batch is as wide as its longest row.

    It is 0 without batches, in a run without steps.
    """
    positions = tokens = 0
    for batch in batches:
        in_batch = lengths[batch]
        positions += len(in_batch) * int(in_batch.max())
        tokens += int(in_batch.sum())
    return 1 - tokens / positions if positions else 0.0


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


def best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Return the numbers of the texts of each block of `length` tokens, in the order of the texts.

    The longest come first, each into the fullest block that has room for it.

    Args:
        lengths: of the texts, none above `length`.
    """
    chosen: list[list[int]] = []  # numbers of the texts of each block
    rooms: list[tuple[int, int]] = []  # of the blocks that are not full: (room, block), sorted
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[number]
        place = bisect_left(rooms, (size, 0))
        room, block = rooms.pop(place) if place < len(rooms) else (length, len(chosen))
        if block == len(chosen):
            chosen.append([])
        chosen[block].append(number)
        if room > size:
            insort(rooms, (room - size, block))
    # in the order of the texts, as far as whole blocks can be
    return sorted(map(sorted, chosen))
