"""Low-bit weights: a code for each entry, and a mean and a standard deviation for each matrix.

Shapes: L matrices, N entries each, K = 2^bits codes. Entry i, row by row, has its code's number
(0 is the smallest) at bit `bits * (i % per)` of byte `i // per`, with `per = 8 / bits` codes in a
byte, little end first.
"""

from itertools import pairwise

import torch
from torch import Tensor

from petl.ops.normal_codes import POSITIVE_CODES

BITS = tuple(POSITIVE_CODES)
EPSILON = 1e-5  # added to the standard deviation, as in the code of Jie et al.


_BOOKS: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # once to each device


def code_book(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The codes [K], ascending, and the boundaries between them [K - 1], float32."""
    if torch.compiler.is_compiling():
        return _code_book(bits, device)
    book = _BOOKS.get((bits, device))
    if book is None:
        book = _code_book(bits, device)
        if type(book[0]) is Tensor:  # not that of a dry run, which has no values
            _BOOKS[bits, device] = book
    return book


def _code_book(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positive = POSITIVE_CODES[bits]
    codes = [-code for code in reversed(positive)] + list(positive)
    bounds = [(low + high) / 2 for low, high in pairwise(codes)]
    return (
        torch.tensor(codes, dtype=torch.float32, device=device),
        torch.tensor(bounds, dtype=torch.float32, device=device),
    )


def nearest(Z: Tensor, bits: int) -> Tensor:
    """The number of the code nearest to each entry of `Z`, int64 in Z's shape."""
    return torch.bucketize(Z, code_book(bits, Z.device)[1])


def quantize_each(W_LN: Tensor, bits: int) -> Tensor:
    """Each row of `W_LN` by its own mean and deviation: `sigma * code + mu`, float32 [L, N].

    The gradient takes the rounding for the identity and flows through mu and sigma.
    """
    W_LN = W_LN.float()
    sigma, mu = torch.std_mean(W_LN, dim=1, keepdim=True)
    Z_LN = (W_LN - mu) / (sigma + EPSILON)
    rounded = code_book(bits, W_LN.device)[0][nearest(Z_LN.detach(), bits)]
    return sigma * (rounded + (Z_LN - Z_LN.detach())) + mu  # exactly the code: the rest is 0


def quantize(W: Tensor, bits: int) -> Tensor:
    """`W`, of any shape, as one quantised matrix."""
    return quantize_each(W.reshape(1, -1), bits).view(W.shape)


def encode(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`quantize(W)` as packed codes, uint8 [ceil(N bits / 8)], and stats, float32 [mu, sigma]."""
    W_1N = W.detach().float().reshape(1, -1)
    sigma, mu = torch.std_mean(W_1N, dim=1, keepdim=True)
    numbers = nearest((W_1N - mu) / (sigma + EPSILON), bits)
    return pack(numbers.view(-1), bits), torch.cat([mu, sigma]).view(2)


def decode(packed: Tensor, stats: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """The float32 weights of `shape` that `encode` stands for."""
    mu, sigma = stats
    return (sigma * codes_of(packed, shape, bits) + mu).view(shape)


def decode_latent(packed: Tensor, stats: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """Weights to train on from: those whose quantised values are `decode`'s.

    Rounding shrinks the spread (to 0.67 at one bit), so the weights are spread out again until
    their mean and deviation are `stats`. Weights that all have one code stay as they are.
    """
    codes = codes_of(packed, shape, bits)
    mu, sigma = stats
    spread, middle = torch.std_mean(codes)
    if spread == 0:
        return decode(packed, stats, shape, bits)
    return (sigma * ((codes - middle) / spread) + mu).view(shape)


def codes_of(packed: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """The codes [N] of the weights of `shape`."""
    return code_book(bits, packed.device)[0][unpack(packed, shape.numel(), bits)]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return -(-count * bits // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits [N] as bytes, uint8; the last one is filled up with zeros."""
    per_byte = 8 // bits
    missing = -len(numbers) % per_byte
    columns = torch.nn.functional.pad(numbers, (0, missing)).view(-1, per_byte)
    return (columns << shifts(bits, numbers.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The first `count` numbers in `packed`, int64."""
    numbers = packed.long().unsqueeze(1) >> shifts(bits, packed.device) & (2**bits - 1)
    return numbers.view(-1)[:count]


def shifts(bits: int, device: torch.device) -> Tensor:
    """By how many bits each number of a byte is shifted."""
    return torch.arange(0, 8, bits, device=device)
