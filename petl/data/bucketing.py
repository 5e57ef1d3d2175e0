"""A batch sampler of rows of similar length, for a DataLoader under Trainer or Accelerate.

Żelasko et al. 2025, "Training and Inference Efficiency of Encoder-Decoder Speech Models",
arXiv:2503.05931. Two departures: there the rows come as a stream, here they are known, so the
batches of an epoch are made first and then drawn, and no bucket is ever found empty; and an output
that is unusually long for its input only leaves the edges alone, it is not dropped.

petl's own loop has `Buckets` (petl/data/lengths.py): as many steps in every epoch, with full ones
wherever possible. A sampler's last batch of each bucket is short.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from petl.data.buckets import (
    Ints,
    bucket_edges,
    drawing,
    effective,
    fill,
    padding_share,
    permuted,
    split_by,
)
from petl.errors import InputError


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of row numbers, each from one bucket, in a random order that the seed repeats.

    Every row comes once an epoch. Batches come in groups of `world_size` from one bucket, since
    Accelerate gives batch i to process i mod world_size; leave its `even_batches` at the default.
    To make groups whole, batches are halved. Single rows that are left over meet those of other
    buckets at the end of the epoch, where the last group may lack batches.

    Batches differ in size, so a loss has to be averaged by tokens over all processes and
    accumulation steps, as Trainer does through `num_items_in_batch`. There is no attribute
    `batch_size`: given one, Accelerate drops every group whose last batch has another size.

    Args:
        lengths: of the rows, [N] whole numbers from 1: tokens after truncation, not characters.
        out_lengths: of the outputs of an encoder-decoder model, [N]; buckets are then split by
            output length as well.
        n_buckets: by length, at most; equal edges are merged.
        sub_buckets: of each by output length; as many times more where edges were merged.
        max_tokens: a batch is full when one more row as long as its longest would exceed this.
        batch_sizes: instead, the rows of a batch: one number, or one for each bucket
            (for each sub-bucket, bucket after bucket, with `sub_buckets`).
        quadratic: the length at which a row counts twice against `max_tokens`, since attention
            costs more than in proportion: a length l counts as l + l^2 / quadratic.
        shuffle: draw rows within buckets and the order of batches anew in each epoch.
        seed: of those draws, the same on all processes.
        drop_last: leave out batches that are not full and groups that are not whole.
        world_size: number of processes.
        edges: the longest length of each bucket but the last, rising; None: by `bucket_edges`.
        too_long: what a row that alone exceeds `max_tokens` does: "raise" an error, or go "alone".
        ratio_sigma: edges of outputs leave out rows whose ratio of output to input is so many
            standard deviations above the mean of their bucket.
        strict: an output longer than all that made its bucket's edges joins the last sub-bucket;
            else the first sub-bucket of a longer bucket that has such outputs.

    Attributes:
        buckets: the rows of each, in the order of `lengths`.
        edges: of the lengths, without repetition.

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
        check(**least_one, max_tokens=max_tokens, quadratic=quadratic)
        if (max_tokens is None) == (batch_sizes is None):
            raise InputError("give one of max_tokens and batch_sizes")
        if too_long not in ("raise", "alone"):
            raise InputError(f"too_long={too_long!r} is not one of raise, alone")
        self.lengths = whole_lengths("lengths", lengths)
        self.max_tokens, self.quadratic, self.shuffle = max_tokens, quadratic, shuffle
        self.seed, self.drop_last, self.world_size = seed, drop_last, world_size
        most = self.effective(self.lengths.max())
        if max_tokens is not None and most > max_tokens and too_long == "raise":
            raise InputError(
                f"a row of {self.lengths.max()} tokens counts {most:g}, more than "
                f"max_tokens={max_tokens}: raise that, or let such rows go too_long='alone'"
            )
        bounds = bucket_edges(self.lengths, n_buckets) if edges is None else list(edges)
        if bounds != sorted(bounds):
            raise InputError(f"edges={bounds} do not rise")
        longest = self.lengths.max() if edges is None else np.inf  # no bucket is above it
        self.edges = distinct(bounds, longest)
        self.buckets = split_by(self.edges, self.lengths, np.arange(len(self.lengths), dtype="i4"))
        self.out_lengths = None
        if out_lengths is not None:
            self.out_lengths = whole_lengths("out_lengths", out_lengths)
            if len(self.out_lengths) != len(self.lengths):
                raise InputError(
                    f"out_lengths are {len(self.out_lengths)}, lengths {len(self.lengths)}"
                )
            merged = [bounds.count(edge) for edge in self.edges]
            merged.append(1 + len(bounds) - sum(merged))
            counts = [sub_buckets * times for times in merged]
            self.buckets = self._split_by_output(self.out_lengths, counts, ratio_sigma, strict)
        elif sub_buckets > 1:
            raise InputError(f"sub_buckets={sub_buckets} needs out_lengths")
        self.batch_sizes = None
        if batch_sizes is not None:
            self.batch_sizes = sizes_of_buckets(batch_sizes, len(self.buckets))
        self.epoch = 0
        self._start = self._given = 0  # batches of the epoch
        self._made: tuple[list[Ints], list[int]] | None = None

    # Buckets

    def effective(self, lengths: Any) -> Any:
        """What rows of these lengths count against `max_tokens`."""
        return effective(lengths, self.quadratic)

    def _split_by_output(
        self, outputs: Ints, counts: list[int], sigma: float, strict: bool
    ) -> list[Ints]:
        """Sub-buckets, bucket after bucket."""
        split: list[Ints] = []
        unfit: list[tuple[int, Ints]] = []  # rows longer than what made the edges; their place
        for rows, count in zip(self.buckets, counts, strict=True):
            ratio = outputs[rows] / self.lengths[rows]
            usual = outputs[rows[ratio <= ratio.mean() + sigma * ratio.std()]] if len(rows) else []
            longest = max(usual, default=0)
            edges = distinct(bucket_edges(usual, count), longest) if len(usual) else []
            joining = [rows[outputs[rows] <= longest]]
            if not strict:
                joining += [waiting[outputs[waiting] <= longest] for _, waiting in unfit]
                unfit = [(i, waiting[outputs[waiting] > longest]) for i, waiting in unfit]
            split += split_by(edges, outputs, np.concatenate(joining))
            unfit.append((len(split) - 1, rows[outputs[rows] > longest]))
        for place, rows in unfit:
            split[place] = np.concatenate([split[place], rows])
        return split

    # Batches

    def _batches(self) -> tuple[list[Ints], list[int]]:
        """The batches of this epoch in their order, and the bucket of each."""
        if self._made is None:
            draw, world = drawing(self.seed, self.epoch), self.world_size
            groups: list[tuple[int, list[Ints]]] = []
            rest: list[tuple[int, list[Ints]]] = []
            for bucket, rows in enumerate(self.buckets):
                if not len(rows):
                    continue
                batches = self._fill(
                    bucket, rows[permuted(len(rows), draw)] if self.shuffle else rows
                )
                whole = len(batches) // world * world
                groups += [(bucket, batches[i : i + world]) for i in range(0, whole, world)]
                rest.append((bucket, batches[whole:]))
            if self.shuffle:  # buckets come in proportion to what is left of them
                groups = [groups[i] for i in permuted(len(groups), draw)]
            drawn = groups if self.drop_last else groups + rest
            pairs = [(batch, bucket) for bucket, batches in drawn for batch in batches]
            self._made = [batch for batch, _ in pairs], [bucket for _, bucket in pairs]
        return self._made

    def _fill(self, bucket: int, rows: Ints) -> list[Ints]:
        """All batches of a bucket; whole groups of them, if it has enough rows."""
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
        while len(batches) % self.world_size:
            i = max(range(len(batches)), key=lambda i: len(batches[i]))
            if len(batches[i]) == 1:
                break
            batches[i : i + 1] = np.array_split(batches[i], 2)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        batches, _ = self._batches()
        start, self._start = self._start, 0
        for i in range(start, len(batches)):
            self._given = i + 1
            yield batches[i].tolist()
        self._given = 0

    def __len__(self) -> int:
        """Batches of this epoch, over all processes."""
        return len(self._batches()[0])

    def bucket_indices(self) -> list[int]:
        """The bucket of each batch of this epoch."""
        return list(self._batches()[1])

    def padding_ratio(self, *, outputs: bool = False) -> float:
        """The share of positions in this epoch's batches that is padding; of outputs if asked."""
        lengths = self.out_lengths if outputs else self.lengths
        if lengths is None:
            raise InputError("there are no out_lengths")
        return padding_share(lengths, self._batches()[0])

    # Epochs and resuming

    @property
    def sampler(self) -> "BucketBatchSampler":
        """Itself: on several processes Accelerate looks here for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Draw as for this epoch, from 0; another one than now starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._made = epoch, None
            self._start = self._given = 0

    def state_dict(self) -> dict[str, Any]:
        """Where it is: the batches given out since the epoch began, over all processes.

        A DataLoader with workers asks ahead: set "batch" to those that were trained on.
        """
        return {"epoch": self.epoch, "batch": self._given, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration gives the batches that were left.

        Raises:
            InputError: the state is of other rows or settings.
        """
        if state["identity"] != self._identity():
            raise InputError("the state is that of a sampler of other lengths or settings")
        self.set_epoch(state["epoch"])
        self._start = self._given = state["batch"]

    def _identity(self) -> str:
        """A hash of all that the batches depend on; random states follow from seed and epoch."""
        settings = (self.max_tokens, self.batch_sizes, self.quadratic, self.shuffle, self.seed)
        hasher = hashlib.sha256(repr((*settings, self.drop_last, self.world_size)).encode())
        for numbers in (self.lengths, *self.buckets):
            hasher.update(numbers.tobytes())
        return hasher.hexdigest()


def check(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} is below 1")


def distinct(edges: Sequence[int], longest: float) -> list[int]:
    """The edges below the longest row, each once."""
    return sorted({edge for edge in edges if edge < longest})


def whole_lengths(name: str, given: ArrayLike) -> NDArray[np.int32]:
    lengths = np.asarray(given)
    if lengths.ndim != 1 or not len(lengths) or not np.issubdtype(lengths.dtype, np.integer):
        kind = f"{lengths.dtype} {list(lengths.shape)}"
        raise InputError(f"{name} are not a list of whole numbers but {kind}")
    if lengths.min() < 1:
        raise InputError(f"{name} contain {lengths.min()}, which is below 1")
    return lengths.astype(np.int32)


def sizes_of_buckets(given: int | Sequence[int], count: int) -> list[int]:
    sizes = [given] * count if isinstance(given, int) else list(given)
    if len(sizes) != count:
        raise InputError(f"batch_sizes are {len(sizes)}, and there are {count} buckets")
    check(**{f"batch_sizes[{i}]": size for i, size in enumerate(sizes)})
    return sizes
