"""Masks of weights: choose the entries to keep, and store a mask in one bit per entry.

A packed mask is uint8 [ceil(N / 8)]: entry i of the flat, row-major matrix is bit i % 8 of byte
i // 8, low bits first; 1 is kept, and the bits after the last entry are 0.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# eight bytes of 0 or 1, read as one integer, times GATHER have these bits in the highest byte;
# a byte times SPREAD, and bits of it by SELECT, has bit k in byte k (both little-endian)
GATHER, SPREAD = 0x0102040810204080, 0x0101010101010101
SELECT = 0x8040201008040201 - 2**64  # as a signed integer
CARRY = 0x7F7F7F7F7F7F7F7F


def packed_size(entries: int) -> int:
    """Return the number of bytes of a packed mask."""
    return -(-entries // 8)


def pack_mask(keep: Tensor) -> Tensor:
    """Return a mask of bools, of any shape, in packed form."""
    flat = keep.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
    words = padded.contiguous().view(torch.int64)
    return (words * GATHER >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a packed mask as bools of this shape."""
    # a byte of `words` has one bit or none; adding 127 carries it into the highest bit
    words = packed.long().mul_(SPREAD).bitwise_and_(SELECT).add_(CARRY)
    words >>= 7
    return words.bitwise_and_(SPREAD).view(torch.bool)[: math.prod(shape)].view(shape)


def mask_factors(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a packed mask as numbers 0 and 1 of this shape.

    Measured on a CPU: a product with bools takes ten times as long as one with these.
    """
    return unpack_mask(packed, shape).view(torch.uint8).to(dtype)


def all_kept(entries: int, device: torch.device | None = None) -> Tensor:
    """Return the packed mask that keeps everything."""
    packed = torch.full((packed_size(entries),), 255, dtype=torch.uint8, device=device)
    if entries % 8:
        packed[-1] = 2 ** (entries % 8) - 1
    return packed


def count_kept(packed: Tensor) -> Tensor:
    """Return the number of kept entries, 0-d int64 on the device of the mask."""
    ones = torch.tensor([byte.bit_count() for byte in range(256)], device=packed.device)
    return ones[packed.long()].sum()


@torch.no_grad()
def keep_largest(scores: Tensor, pruned: int) -> Tensor:
    """Return a mask of bools, in the shape of `scores`, without the `pruned` smallest scores.

    Among equal scores the first in row order are pruned, so that the number is exact and the choice
    the same everywhere. NaN counts as the largest. On devices other than the CPU the host does not
    wait for the result.

    Args:
        scores: float32.
        pruned: from 0 to the number of scores.
    """
    flat = scores.detach().reshape(-1)
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    # other types (in dry runs) have no memory that NumPy could read
    on_host = type(flat) is Tensor and flat.device.type == "cpu"
    keep = _on_host(flat, pruned) if on_host else _on_device(flat, pruned)
    return keep.view(scores.shape)


def _on_host(flat: Tensor, pruned: int) -> Tensor:
    """As `keep_largest`: NumPy's partition takes an eighth of the time of `torch.kthvalue`."""
    scores = flat.numpy()
    threshold = np.partition(scores, pruned - 1)[pruned - 1]
    # not `>`, which is false for NaN
    keep = ~(scores <= threshold)
    excess = len(scores) - int(np.count_nonzero(keep)) - pruned
    # some that equal the threshold are kept: the last ones
    if excess > 0:
        keep[np.flatnonzero(scores == threshold)[-excess:]] = True
    return torch.from_numpy(keep)


def _on_device(flat: Tensor, pruned: int) -> Tensor:
    # topk, unlike kthvalue, uses the whole device for one long row
    kept = len(flat) - pruned + 1
    if pruned <= kept:
        threshold = flat.topk(pruned, largest=False, sorted=False).values.max()
    else:
        threshold = flat.topk(kept, sorted=False).values.min()
    below, equal = flat < threshold, flat == threshold
    rank = equal.cumsum(0, dtype=torch.int32)
    return ~(below | (equal & (rank <= pruned - below.sum())))


HALF_BITS = 16  # of a float32, per pass over the scores


@torch.no_grad()
def prune_smallest(
    masks: Sequence[Tensor], scores: Callable[[int], Tensor], count: int
) -> list[Tensor]:
    """Return packed masks without the `count` smallest scores among the entries that they keep.

    The entries of all matrices are compared with one another; one matrix of scores is in memory at
    a time. Among equal scores the first ones are pruned, so that the number is exact. NaN counts as
    the largest.

    Args:
        masks: packed.
        scores: called three times for each index of a mask; returns scores of at least 0, of any
            shape, the same each time; computed with in float32.
        count: from 0 to the number of kept entries.
    """
    if count == 0:
        return list(masks)

    def bits_and_kept(index: int) -> tuple[Tensor, Tensor]:
        # as integers, floats of at least 0 have the same order
        bits = scores(index).detach().float().reshape(-1).contiguous().view(torch.int32)
        return bits, unpack_mask(masks[index], tuple(bits.shape))

    def histogram(prefix: int | None) -> list[int]:
        total = torch.zeros(2**HALF_BITS + 1, dtype=torch.int64)
        for index in range(len(masks)):
            bits, kept = bits_and_kept(index)
            high = bits >> HALF_BITS
            if prefix is None:
                values = high
            else:
                kept, values = kept & (high == prefix), bits & (2**HALF_BITS - 1)
            # entries that do not count go to a bin of their own
            binned = torch.where(kept, values, 2**HALF_BITS)
            total += torch.bincount(binned, minlength=len(total)).cpu()
        return total[:-1].tolist()

    high, before = _bin_of(histogram(None), count)
    low, more = _bin_of(histogram(high), count - before)
    threshold, ties = high << HALF_BITS | low, count - before - more
    found = []
    for index in range(len(masks)):
        bits, kept = bits_and_kept(index)
        equal = kept & (bits == threshold)
        first = equal & (equal.cumsum(0) <= ties)
        ties -= int(first.sum())
        found.append(pack_mask(kept & ~first & (bits >= threshold)))
    return found


def _bin_of(counts: Sequence[int], rank: int) -> tuple[int, int]:
    """Return the bin of the entry of this rank, from 1, and the number of entries before it."""
    before = 0
    for index, number in enumerate(counts):
        if before + number >= rank:
            return index, before
        before += number
    raise ValueError(f"rank {rank} is above the {before} entries")
