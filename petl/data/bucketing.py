"""Length-bucketed batch sampler for a DataLoader, with Trainer or Accelerate.

Żelasko et al. 2025, "Training and Inference Efficiency of Encoder-Decoder Speech Models",
arXiv:2503.05931. Two departures: the paper reads rows from a stream, while here all rows are known,
so that the batches of an epoch are made first and then permuted, and no bucket runs empty; and an
output that is unusually long for its input is not dropped, it only does not count for the edges.

petl's own loop uses `Buckets` (petl/data/batch_sampler.py), which have the same number of steps in
every epoch and full steps where possible. In this sampler the last batch of each bucket is short.
"""

import hashlib
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from petl.data.batch_sampler import (
    Ints,
    effective,
    epoch_generator,
    padding_fraction,
    random_permutation,
    split_by,
)
from petl.errors import InputError
from petl.system.values import bounded, one_of

AT_LEAST_1 = bounded(ge=1)


class SamplerState(TypedDict):
    """The position of a sampler, and a hash of all that its batches depend on."""

    epoch: int
    batch: int
    identity: str


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of row numbers, each from one bucket, in a random order that depends on the seed.

    Every row is in one batch of an epoch. Batches come in groups of `world_size` from one bucket,
    since Accelerate gives batch i to process i mod world_size; leave its `even_batches` at the
    default. Batches are halved where a group is not complete. Single rows that are left over are
    grouped with those of other buckets at the end of the epoch, where the last group may be
    incomplete.

    Batches differ in size, so a loss has to be averaged by tokens over all processes and
    accumulation steps, as Trainer does through `num_items_in_batch`. There is no attribute
    `batch_size`: given one, Accelerate drops every group whose last batch has another size.

    Args:
        lengths: lengths of the rows, [N] integers from 1: tokens after truncation, not characters.
        out_lengths: lengths of the outputs of an encoder-decoder model, [N]; buckets are then split
            by output length as well.
        n_buckets: maximum number of buckets by length; equal edges are merged.
        sub_buckets: sub-buckets of each bucket by output length; a bucket of merged edges gets a
            multiple.
        max_tokens: a batch is full when one more row as long as its longest would exceed this.
        batch_sizes: alternative to `max_tokens`: rows of a batch, one number or one for each bucket
            (for each sub-bucket, bucket after bucket, with `sub_buckets`).
        quadratic: the length at which a row counts twice against `max_tokens`, since the cost of
            attention grows faster than the length: a length l counts as l + l^2 / quadratic.
        shuffle: permute the rows within buckets and the order of batches in each epoch.
        seed: seed of these permutations, the same on all processes.
        drop_last: leave out batches that are not full and groups that are not complete.
        world_size: number of processes.
        edges: the longest length of each bucket but the last, ascending; None: by `bucket_edges`.
        too_long: for a row that alone exceeds `max_tokens`: "raise" an error, or make it a batch
            "alone".
        ratio_sigma: rows whose ratio of output to input length is more than this number of
            standard deviations above the mean of their bucket do not count for edges of outputs.
        strict: if True, an output longer than all that count for its bucket's edges is put into
            the last sub-bucket; else into the first sub-bucket of a longer bucket with some.

    Attributes:
        buckets: row numbers of each bucket, in the order of `lengths`.
        edges: edges of the lengths, without repetition.

    Raises:
        InputError: a value out of range, or lists of unequal length.
    """

    def __init__(  # noqa: PLR0913 - all by name
        self,
        lengths: ArrayLike,
        *,
        out_lengths: ArrayLike | None = None,
        n_buckets: int = 10,
        sub_buckets: int = 1,
        max_tokens: int | None = None,
        batch_sizes: int | Sequence[int] | None = None,
        quadratic: float | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        world_size: int = 1,
        edges: Sequence[int] | None = None,
        too_long: str = "raise",
        ratio_sigma: float = 4.0,
        strict: bool = True,
    ) -> None:
        least_one = {"n_buckets": n_buckets, "sub_buckets": sub_buckets, "world_size": world_size}
        for name, value in {**least_one, "max_tokens": max_tokens, "quadratic": quadratic}.items():
            AT_LEAST_1.check(name, value, Real | None)
        one_of("raise", "alone").check("too_long", too_long)
        if (max_tokens is None) == (batch_sizes is None):
            raise InputError(
                f"max_tokens={max_tokens} and batch_sizes={batch_sizes}: give one of the two"
            )
        self.lengths = integer_lengths("lengths", lengths)
        self.max_tokens, self.quadratic, self.shuffle = max_tokens, quadratic, shuffle
        self.seed, self.drop_last, self.world_size = seed, drop_last, world_size
        longest_counts = self.effective(self.lengths.max())
        if max_tokens is not None and longest_counts > max_tokens and too_long == "raise":
            raise InputError(
                f"a row of {self.lengths.max()} tokens counts as {longest_counts:g}, more than "
                f"max_tokens={max_tokens}: raise max_tokens, or set too_long='alone'"
            )
        # may contain equal edges, which are merged in `self.edges`
        bounds = bucket_edges(self.lengths, n_buckets) if edges is None else list(edges)
        if bounds != sorted(bounds):
            raise InputError(f"edges={bounds} are not in ascending order")
        longest = self.lengths.max() if edges is None else np.inf  # own edges may exceed all rows
        self.edges = distinct(bounds, longest)
        self.buckets = split_by(self.edges, self.lengths, np.arange(len(self.lengths), dtype="i4"))
        self.out_lengths = None
        if out_lengths is not None:
            self.out_lengths = integer_lengths("out_lengths", out_lengths)
            if len(self.out_lengths) != len(self.lengths):
                raise InputError(
                    f"{len(self.out_lengths)} out_lengths for {len(self.lengths)} lengths: give "
                    "one for each row"
                )
            # a bucket of k merged edges replaces k buckets, so it gets k times the sub-buckets
            merged = [bounds.count(edge) for edge in self.edges]
            merged.append(1 + len(bounds) - sum(merged))
            counts = [sub_buckets * times for times in merged]
            self.buckets = self._split_by_output(self.out_lengths, counts, ratio_sigma, strict)
        elif sub_buckets > 1:
            raise InputError(f"sub_buckets={sub_buckets} needs out_lengths")
        self.batch_sizes = None  # then batches are filled up to `max_tokens`
        if batch_sizes is not None:
            self.batch_sizes = sizes_of_buckets(batch_sizes, len(self.buckets))
        self.epoch = 0
        self._start = self._yielded = 0  # batches of the epoch
        self._epoch_batches: tuple[list[Ints], list[int]] | None = None

    # Buckets

    def effective(self, lengths: object) -> Any:
        """Lengths as counted against `max_tokens`."""
        return effective(lengths, self.quadratic)

    def _split_by_output(
        self, outputs: Ints, counts: list[int], sigma: float, strict: bool
    ) -> list[Ints]:
        """Split each bucket by output length; returns sub-buckets, bucket after bucket."""
        split: list[Ints] = []
        # (index of a sub-bucket, rows with longer outputs than those that count for its edges)
        unfit: list[tuple[int, Ints]] = []
        for rows, count in zip(self.buckets, counts, strict=True):
            # outliers would widen the edges of all sub-buckets
            ratio = outputs[rows] / self.lengths[rows]
            usual = outputs[rows[ratio <= ratio.mean() + sigma * ratio.std()]] if len(rows) else []
            longest = max(usual, default=0)
            edges = distinct(bucket_edges(usual, count), longest) if len(usual) else []
            joining = [rows[outputs[rows] <= longest]]
            # rows of shorter buckets whose long outputs are usual in this bucket
            if not strict:
                joining += [waiting[outputs[waiting] <= longest] for _, waiting in unfit]
                unfit = [(i, waiting[outputs[waiting] > longest]) for i, waiting in unfit]
            split += split_by(edges, outputs, np.concatenate(joining))
            unfit.append((len(split) - 1, rows[outputs[rows] > longest]))
        # no longer bucket has such outputs: put them into the last sub-bucket of their own
        for place, rows in unfit:
            split[place] = np.concatenate([split[place], rows])
        return split

    # Batches

    def _batches(self) -> tuple[list[Ints], list[int]]:
        """The batches of this epoch in order, and the bucket of each."""
        if self._epoch_batches is None:
            generator, world = epoch_generator(self.seed, self.epoch), self.world_size
            groups: list[tuple[int, list[Ints]]] = []
            incomplete: list[tuple[int, list[Ints]]] = []
            for bucket, rows in enumerate(self.buckets):
                if not len(rows):
                    continue
                if self.shuffle:
                    rows = rows[random_permutation(len(rows), generator)]
                batches = self._fill(bucket, rows)
                # a group has one batch for each process
                end = len(batches) // world * world  # of complete groups
                groups += [(bucket, batches[i : i + world]) for i in range(0, end, world)]
                incomplete.append((bucket, batches[end:]))
            if self.shuffle:  # a uniform order of all groups mixes the buckets by their size
                groups = [groups[i] for i in random_permutation(len(groups), generator)]
            ordered = groups if self.drop_last else groups + incomplete
            pairs = [(batch, bucket) for bucket, batches in ordered for batch in batches]
            self._epoch_batches = [batch for batch, _ in pairs], [bucket for _, bucket in pairs]
        return self._epoch_batches

    def _fill(self, bucket: int, rows: Ints) -> list[Ints]:
        """All batches of a bucket, in complete groups if it has enough rows."""
        if self.batch_sizes is not None:
            size = self.batch_sizes[bucket]
            stops = [*range(size, len(rows), size), len(rows)]
            is_full = len(rows) % size == 0
        else:
            assert self.max_tokens is not None
            counted = self.effective(self.lengths[rows])
            stops = fill(counted, self.max_tokens)
            last = counted[[0, *stops][-2] :]
            is_full = (len(last) + 1) * last.max() > self.max_tokens
        batches = np.split(rows, stops[:-1])
        if self.drop_last:
            return batches if is_full else batches[:-1]
        while len(batches) % self.world_size:  # halve the largest until groups are complete
            i = max(range(len(batches)), key=lambda i: len(batches[i]))  # the largest
            if len(batches[i]) == 1:  # nothing left to halve
                break
            batches[i : i + 1] = np.array_split(batches[i], 2)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        batches, _ = self._batches()
        start, self._start = self._start, 0  # the next epoch starts at its first batch
        self._yielded = start
        for i in range(start, len(batches)):
            self._yielded = i + 1
            yield batches[i].tolist()

    def __len__(self) -> int:
        """Number of batches of this epoch, over all processes."""
        return len(self._batches()[0])

    def bucket_indices(self) -> list[int]:
        """The bucket of each batch of this epoch."""
        return list(self._batches()[1])

    def padding_ratio(self, *, outputs: bool = False) -> float:
        """Fraction of padding among the positions of this epoch's batches.

        Args:
            outputs: count the positions of the outputs in place of the inputs.
        """
        lengths = self.out_lengths if outputs else self.lengths
        if lengths is None:
            raise InputError(
                f"padding_ratio(outputs={outputs}) needs a sampler that was given out_lengths"
            )
        return padding_fraction(lengths, self._batches()[0])

    # Epochs and resuming

    @property
    def sampler(self) -> "BucketBatchSampler":
        """This object: with several processes Accelerate calls `set_epoch` of this attribute."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch, from 0; if it changes, start at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._epoch_batches = epoch, None
            self._start = self._yielded = 0

    def state_dict(self) -> SamplerState:
        """The position: epoch, and batches yielded since it began, over all processes.

        A DataLoader with workers prefetches: set "batch" to the number that was trained on.
        """
        return {"epoch": self.epoch, "batch": self._yielded, "identity": self._identity()}

    def load_state_dict(self, state: SamplerState) -> None:
        """Resume: the next iteration yields the remaining batches of the epoch.

        Raises:
            InputError: the state belongs to other lengths or settings.
        """
        if state["identity"] != self._identity():
            raise InputError(
                f"cannot resume at batch {state['batch']} of epoch {state['epoch']}: the state "
                "belongs to a sampler of other lengths or settings"
            )
        self.set_epoch(state["epoch"])
        self._start = self._yielded = state["batch"]

    def _identity(self) -> str:
        """A hash of all that the batches depend on besides the epoch."""
        settings = (self.max_tokens, self.batch_sizes, self.quadratic, self.shuffle, self.seed)
        hasher = hashlib.sha256(repr((*settings, self.drop_last, self.world_size)).encode())
        # edges and output lengths are contained in the buckets
        for numbers in (self.lengths, *self.buckets):
            hasher.update(numbers.tobytes())
        return hasher.hexdigest()


def distinct(edges: Sequence[int], longest: float) -> list[int]:
    """The edges below the longest row, without repetition."""
    return sorted({edge for edge in edges if edge < longest})


def integer_lengths(name: str, values: ArrayLike) -> NDArray[np.int32]:
    """Check lengths, [N] integers from 1, and return them as int32."""
    lengths = np.asarray(values)
    if lengths.ndim != 1 or not len(lengths) or not np.issubdtype(lengths.dtype, np.integer):
        found = f"{lengths.dtype} of shape {list(lengths.shape)}"
        raise InputError(f"{name} is {found}, not a list of integers with at least one entry")
    if lengths.min() < 1:
        raise InputError(f"{name} contains {lengths.min()}, which is below 1")
    return lengths.astype(np.int32)


def sizes_of_buckets(batch_sizes: int | Sequence[int], count: int) -> list[int]:
    """The batch size of each of `count` buckets."""
    sizes = [batch_sizes] * count if isinstance(batch_sizes, int) else list(batch_sizes)
    if len(sizes) != count:
        raise InputError(f"{len(sizes)} batch_sizes for {count} buckets: give one for each")
    for i, size in enumerate(sizes):
        AT_LEAST_1.check(f"batch_sizes[{i}]", size, Real)
    return sizes


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
