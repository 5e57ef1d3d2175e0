"""Length bucketing: bucket edges, rows that fill a batch, and the fraction of padding.

Żelasko et al. 2025, "Training and Inference Efficiency of Encoder-Decoder Speech Models",
arXiv:2503.05931: buckets hold equal total length, not equal numbers of rows.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from petl.data.batch_sampler import Ints, epoch_generator, random_permutation
from petl.errors import InputError

# assumptions of `Buckets.of_best_count`
WORTHWHILE = 0.02  # of the positions, for which rows are sorted more finely
MIN_STEPS = 3  # steps of a bucket in an epoch, over which its rows are shuffled
MAX_BUCKETS = 64  # beyond which next to nothing is padding


def bucket_edges(lengths: ArrayLike, n_buckets: int) -> list[int]:
    """The longest length of each bucket but the last; at most `n_buckets - 1`, some repeated.

    Walking up the sorted lengths, a bucket ends where its sum exceeds `1 / n_buckets` of the total.
    """
    # searching the cumulative sum replaces a loop over all rows
    rising = np.sort(np.asarray(lengths))
    sums = np.cumsum(rising, dtype=np.int64)
    edges: list[int] = []
    base, tokens = 0, sums[-1] / n_buckets
    while (end := int(np.searchsorted(sums, base + tokens, side="right"))) < len(rising):
        edges.append(int(rising[end]))
        base = int(sums[end])
    return edges


def split_by(edges: Sequence[int], lengths: Ints, rows: Ints) -> list[Ints]:
    """Split `rows` into buckets, keeping their order.

    A length equal to an edge is in the lower bucket.
    """
    # side="left": a length equal to an edge is below it
    bucket = np.searchsorted(edges, lengths[rows], side="left")
    order = np.argsort(bucket, kind="stable")  # stable: keeps the order of rows within a bucket
    stops = np.searchsorted(bucket[order], np.arange(1, len(edges) + 1))
    return np.split(rows[order], stops)


def fill(lengths: Ints, budget: float) -> list[int]:
    """End positions of batches of the rows in this order.

    A batch takes rows while number of rows * longest length <= `budget`; a row that is longer than
    the budget is a batch of its own.
    """
    stops: list[int] = []
    # no batch has more rows than the budget holds of the shortest row
    start, max_rows = 0, max(1, int(budget // lengths.min()))
    while start < len(lengths):
        # padded size of the batch after each further row
        longest = np.maximum.accumulate(lengths[start : start + max_rows])
        padded = longest * np.arange(1, len(longest) + 1)
        start += max(1, int(np.searchsorted(padded, budget, side="right")))
        stops.append(start)
    return stops


def effective(lengths: Any, quadratic: float | None) -> Any:
    """Lengths as counted against a token budget: l + l^2 / `quadratic`.

    The quadratic term is for attention, whose cost grows faster than the length.
    """
    if quadratic is None:
        return lengths
    return lengths + np.square(lengths, dtype=np.float64) / quadratic


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


def sizes_of_chunks(count: int, size: int) -> Ints:
    """Sizes of the chunks of `count` items: all `size`, and the last with the remainder."""
    sizes = np.full(math.ceil(count / size), size, np.int32)
    sizes[-1] = count - size * (len(sizes) - 1)
    return sizes
