"""Rows by their length: where buckets end, how many rows fill a batch, what padding costs.

Żelasko et al. 2025, "Training and Inference Efficiency of Encoder-Decoder Speech Models",
arXiv:2503.05931: buckets hold equal total length, not equally many rows.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from petl.errors import InputError

Ints = NDArray[Any]  # of whole numbers


def bucket_edges(lengths: ArrayLike, n_buckets: int) -> list[int]:
    """The longest length of each bucket but the last; at most `n_buckets - 1`, some repeated.

    Walking up the sorted lengths, a bucket ends where its sum exceeds `1 / n_buckets` of the total.
    """
    rising = np.sort(np.asarray(lengths))
    sums = np.cumsum(rising, dtype=np.int64)
    edges: list[int] = []
    base, share = 0, sums[-1] / n_buckets
    while (end := int(np.searchsorted(sums, base + share, side="right"))) < len(rising):
        edges.append(int(rising[end]))
        base = int(sums[end])
    return edges


def split_by(edges: Sequence[int], lengths: Ints, rows: Ints) -> list[Ints]:
    """`rows` by bucket, in their order; a length equal to an edge is in the lower bucket."""
    bucket = np.searchsorted(edges, lengths[rows], side="left")
    order = np.argsort(bucket, kind="stable")
    stops = np.searchsorted(bucket[order], np.arange(1, len(edges) + 1))
    return np.split(rows[order], stops)


def fill(lengths: Ints, budget: float) -> list[int]:
    """Where batches of the rows in this order end: each takes rows while n * longest <= `budget`.

    A row that is longer than the budget is a batch of its own.
    """
    stops: list[int] = []
    start, most = 0, max(1, int(budget // lengths.min()))
    while start < len(lengths):
        longest = np.maximum.accumulate(lengths[start : start + most])
        padded = longest * np.arange(1, len(longest) + 1)
        start += max(1, int(np.searchsorted(padded, budget, side="right")))
        stops.append(start)
    return stops


def effective(lengths: Any, quadratic: float | None) -> Any:
    """What lengths count against a budget: l + l^2 / `quadratic`, since attention costs more than
    in proportion.
    """
    if quadratic is None:
        return lengths
    return lengths + np.square(lengths, dtype=np.float64) / quadratic


def padding_share(lengths: Ints, batches: Iterable[Sequence[int] | Ints]) -> float:
    """The share of positions that are padding when each batch is as wide as its longest row."""
    positions = tokens = 0
    for batch in batches:
        found = lengths[batch]
        positions += len(found) * int(found.max())
        tokens += int(found.sum())
    return 1 - tokens / positions


def drawing(seed: int, epoch: int) -> torch.Generator:
    """A generator whose draws depend on nothing but the arguments."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def permuted(count: int, draw: torch.Generator) -> Ints:
    """The numbers below `count` in random order, int64."""
    return torch.randperm(count, generator=draw).numpy()


class Buckets:
    """Steps of rows of similar length, equally many in every epoch.

    Args:
        lengths: of the rows, [N], tokens.
        parts: for each bucket its rows by rising length, and how many of them a step has. The last
            of its steps may have fewer.

    Attributes:
        rows: of each bucket.
        steps: rows of its full steps.
        sizes: rows of each step of an epoch before the steps are permuted, [S].
    """

    def __init__(self, lengths: Ints, parts: Sequence[tuple[Ints, int]]) -> None:
        self.rows = [rows for rows, _ in parts]
        self.steps = [size for _, size in parts]
        self.sizes = np.concatenate([sizes_of_chunks(len(rows), size) for rows, size in parts])
        self._lengths = lengths
        self._order: tuple[tuple[int, int], Ints] | None = None

    @classmethod
    def by_share(
        cls,
        lengths: Ints,
        count: int,
        batch_size: int,
        max_tokens: int | None = None,
        quadratic: float | None = None,
    ) -> "Buckets":
        """About `count` buckets, each with its share of all tokens, of steps full where possible.

        Rows are sorted by length and cut where a bucket holds its share, moved so that it holds
        whole steps; rows of the same length may so be in two buckets. Of steps of `batch_size` rows
        there are as many as without buckets, and only the last of the longest bucket may be short.

        Args:
            lengths: of the rows, [N], tokens.
            count: of buckets, about.
            batch_size: rows of a step.
            max_tokens: instead, most positions of a step, rows times the longest length of the
                bucket.
            quadratic: the length at which a row counts twice against `max_tokens`.

        Raises:
            InputError: a row is longer than `max_tokens`.
        """
        order = np.argsort(lengths, kind="stable").astype(np.int32)
        rising = effective(lengths[order], quadratic)
        longest = rising[-1]
        if max_tokens is not None and longest > max_tokens:
            counted = "" if quadratic is None else f" that train.quadratic={quadratic:g} counts"
            raise InputError(
                f"train.max_tokens={max_tokens} is less than the {longest:g} tokens{counted} of "
                "the longest row: raise it, or cut rows with data.max_length"
            )

        def rows_of_step(stop: int) -> int:
            return batch_size if max_tokens is None else int(max_tokens // rising[stop - 1])

        sums = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
        parts: list[tuple[Ints, int]] = []
        start = 0
        while start < len(order):
            stop = int(np.searchsorted(sums, sums[start] + sums[-1] / count))
            size = rows_of_step(max(start + 1, min(stop, len(order))))
            stop = min(start + size * max(1, round((stop - start) / size)), len(order))
            parts.append((order[start:stop], rows_of_step(stop)))  # fewer if longer rows came in
            start = stop
        return cls(lengths, parts)

    @classmethod
    def by_size(cls, lengths: Ints, batch_sizes: Mapping[int, int]) -> "Buckets":
        """Buckets that end at given lengths, with at most so many rows in a step.

        The rows of a bucket are dealt evenly to as few steps as hold them.

        Args:
            lengths: of the rows, [N], tokens.
            batch_sizes: by the longest length of a bucket, most rows of a step.

        Raises:
            InputError: a row is longer than all buckets.
        """
        bounds = sorted(batch_sizes)
        longest = int(lengths.max())
        if longest > bounds[-1]:
            raise InputError(
                f"train.batch_sizes ends at rows of {bounds[-1]} tokens, and the longest has "
                f"{longest}: make it anew for these rows (scripts/find_batch_sizes.py), or cut "
                "them with data.max_length"
            )
        order = np.argsort(lengths, kind="stable").astype(np.int32)
        parts: list[tuple[Ints, int]] = []
        for bound, rows in zip(bounds, split_by(bounds[:-1], lengths, order), strict=True):
            if len(rows):
                steps = math.ceil(len(rows) / batch_sizes[bound])
                parts.append((rows, math.ceil(len(rows) / steps)))
        return cls(lengths, parts)

    def heaviest(self, most: int | None = None, processes: int = 1) -> Ints:
        """The rows of the largest forward pass of one process, the longest of their bucket.

        Args:
            most: rows of a forward pass; None: as many as the process has of a step.
            processes: that share the rows of a step.
        """
        shares = [math.ceil(size / processes) for size in self.steps]
        candidates = [
            rows[-min(share, most or share) :]
            for rows, share in zip(self.rows, shares, strict=True)
        ]
        longest = self._lengths
        return max(candidates, key=lambda r: (len(r) * int(longest[r[-1]]), longest[r[-1]]))

    def step_order(self, seed: int, epoch: int) -> Ints:
        """Which of the steps of `sizes` is the first of this epoch, the second, ..., [S]."""
        if self._order is None or self._order[0] != (seed, epoch):
            order = permuted(len(self.sizes), drawing(seed, epoch))
            self._order = (seed, epoch), order
        return self._order[1]

    def batches(self, seed: int, epoch: int) -> Iterator[Ints]:
        """The rows of each step of this epoch, longest first.

        Each bucket's steps are spread over the epoch, so that lengths do not drift in its course.
        """
        draw = drawing(seed, -1 - epoch)  # not the numbers that `step_order` takes
        made: list[Ints] = []
        for rows, size in zip(self.rows, self.steps, strict=True):
            places = permuted(len(rows), draw)
            cuts = range(size, len(rows), size)
            made += [rows[np.sort(part)[::-1]] for part in np.split(places, cuts)]
        return (made[i] for i in self.step_order(seed, epoch))


def sizes_of_chunks(count: int, size: int) -> Ints:
    """`count` in portions of `size`, the last with what is left."""
    sizes = np.full(math.ceil(count / size), size, np.int32)
    sizes[-1] = count - size * (len(sizes) - 1)
    return sizes
