"""Rows by their length: where buckets end, how many rows fill a batch, what padding costs.

Żelasko et al. 2025, "Training and Inference Efficiency of Encoder-Decoder Speech Models",
arXiv:2503.05931: buckets hold equal total length, not equally many rows.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
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
    """Steps of rows of similar length, equally many in every epoch and full wherever possible.

    Rows are sorted by length and cut where a bucket holds its share of all tokens, moved so that it
    holds whole steps; rows of the same length may so be in two buckets. Of steps of `batch_size`
    rows there are as many as without buckets, and only the last of the longest bucket may be short.

    Args:
        lengths: of the rows, [N], tokens.
        count: of buckets, about.
        batch_size: rows of a step.
        max_tokens: instead, most positions of a step, rows times the longest length of the bucket.

    Attributes:
        sizes: rows of each step of an epoch before the steps are permuted, [S].

    Raises:
        InputError: a row is longer than `max_tokens`.
    """

    def __init__(
        self, lengths: Ints, count: int, batch_size: int, max_tokens: int | None = None
    ) -> None:
        order = np.argsort(lengths, kind="stable").astype(np.int32)
        rising = lengths[order]
        longest = int(rising[-1])
        if max_tokens is not None and longest > max_tokens:
            raise InputError(
                f"train.max_tokens={max_tokens} is less than the {longest} tokens of the longest "
                "row: raise it, or cut rows with data.max_length"
            )

        def rows_of_step(stop: int) -> int:
            return batch_size if max_tokens is None else max_tokens // int(rising[stop - 1])

        sums = np.concatenate([[0], np.cumsum(rising, dtype=np.int64)])
        self.rows: list[Ints] = []  # of each bucket, by rising length
        self.steps: list[int] = []  # rows of its full steps
        start = 0
        while start < len(order):
            stop = int(np.searchsorted(sums, sums[start] + sums[-1] / count))
            size = rows_of_step(max(start + 1, min(stop, len(order))))
            stop = min(start + size * max(1, round((stop - start) / size)), len(order))
            self.rows.append(order[start:stop])
            self.steps.append(rows_of_step(stop))  # fewer if longer rows came in
            start = stop
        pairs = list(zip(self.rows, self.steps, strict=True))
        self.sizes = np.concatenate([sizes_of_chunks(len(rows), size) for rows, size in pairs])
        self._lengths = lengths
        self._order: tuple[tuple[int, int], Ints] | None = None

    def heaviest(self, most: int) -> Ints:
        """The rows of the largest forward pass of up to `most` rows, the longest of its bucket."""
        candidates = [
            rows[-min(size, most) :] for rows, size in zip(self.rows, self.steps, strict=True)
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
