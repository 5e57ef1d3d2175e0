"""Rice codes of the positions and signs of kept entries, as a stream of bits.

An entry is coded as its gap to the entry before it (the first one from -1), minus 1: `gap >> b`
ones, a zero, the b low bits from the least significant, and a sign bit, 1 for plus. Bits fill bytes
from the least significant.
"""

import math

import numpy as np
from numpy.typing import NDArray

from petl.errors import InputError

GOLDEN = (1 + math.sqrt(5)) / 2
Bits = NDArray[np.uint8]
Positions = NDArray[np.int64]
Signs = NDArray[np.bool_]


def parameter(kept: int, entries: int) -> int:
    """Return the best parameter b for gaps between `kept` of `entries` random positions.

    Source: Kiely, "Selecting the Golomb Parameter in Rice Coding", IPN Progress Report 42-159
    (2004).
    """
    if kept in (0, entries):
        return 0
    # log1p: exact for few kept entries
    ratio = math.log(GOLDEN - 1) / math.log1p(-kept / entries)
    return max(0, 1 + math.floor(math.log2(ratio)))


def encode(positions: Positions, signs: Signs, b: int) -> tuple[Bits, int]:
    """Return the code of ascending `positions` with `signs`, as bytes and their number of bits."""
    gaps = np.diff(positions, prepend=-1) - 1
    ones = gaps >> b
    ends = np.cumsum(ones + b + 2)
    total = int(ends[-1]) if len(ends) else 0
    tails = ends - b - 2  # index of the zero after the ones
    bits = np.zeros(total, np.uint8)
    # runs of ones: +1 where a run begins, -1 where it ends, summed up
    edges = np.zeros(total + 1, np.int8)
    runs = ones > 0
    edges[(tails - ones)[runs]] += 1
    edges[tails[runs]] -= 1
    np.cumsum(edges[:-1], out=bits, dtype=np.uint8)
    for bit in range(b):
        bits[tails + 1 + bit] = (gaps >> bit) & 1
    bits[ends - 1] = signs
    return np.packbits(bits, bitorder="little"), total


def decode(
    code: Bits, bits: int, kept: int, entries: int, b: int, what: object
) -> tuple[Positions, Signs]:
    """Return the positions and signs of a code.

    Args:
        code: the bytes.
        bits: their number of bits.
        kept: number of entries that are coded.
        entries: number of all entries; positions are below it.
        b: parameter of the code.
        what: the file, for the message.

    Raises:
        InputError: the code has another number of bits or entries, or a position out of range.
    """
    damaged = InputError(f"{what} is damaged: its code is not that of {kept} of {entries} entries")
    if len(code) != -(-bits // 8) or not 0 <= b < 63 or not 0 <= kept <= entries:
        raise damaged
    stream = np.unpackbits(code, bitorder="little")
    if stream[bits:].any() or kept > bits:
        raise damaged
    stream = stream[:bits]
    starts, tails = _codewords(stream, kept, b + 2)
    if len(starts) != kept or (tails[-1] + b + 2 if kept else 0) != bits:
        raise damaged
    gaps = (tails - starts) << b
    for bit in range(b):
        gaps += stream[tails + 1 + bit].astype(np.int64) << bit
    positions = np.cumsum(gaps + 1) - 1
    # a gap beyond the number of entries could overflow the sum
    if kept and (gaps.max() >= entries or gaps.min() < 0 or positions[-1] >= entries):
        raise damaged
    return positions, stream[tails + 1 + b].astype(bool)


def _codewords(stream: Bits, kept: int, tail: int) -> tuple[Positions, Positions]:
    """Return where codewords start, and where the zero after their ones is.

    Args:
        stream: the bits, one to a byte.
        kept: number of codewords; fewer are returned if the stream ends before.
        tail: length of a codeword from its zero on.
    """
    zeros = np.flatnonzero(stream == 0)
    # for each zero, the number of zeros before the end of a codeword that has its zero there
    following = np.searchsorted(zeros, zeros + tail).data  # a memoryview: fast to index
    chosen, at = [], 0
    for _ in range(kept):  # each codeword is found only once the one before it was
        if at >= len(zeros):
            break
        chosen.append(at)
        at = following[at]
    tails = zeros[np.array(chosen, np.int64)]
    # the last one may be cut off; `decode` compares its end with the number of bits
    starts = np.concatenate([[0], tails[:-1] + tail])[: len(tails)]
    if len(tails) and tails[-1] + tail > len(stream):
        return starts[:-1], tails[:-1]
    return starts, tails
