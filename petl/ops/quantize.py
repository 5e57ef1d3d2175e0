"""Quantized weights: a code for each entry, and mean and standard deviation for each matrix.

Shapes: L matrices, N entries each, K = 2^bits codes. In packed form, entry i (row-major) has the
number of its code (0 is the smallest) at bit `bits * (i % per)` of byte `i // per`, with
`per = 8 / bits` codes in a byte, lowest bits first.
"""

from itertools import pairwise

import torch
from torch import Tensor

from petl.ops.normal_codes import POSITIVE_CODES

BITS = tuple(POSITIVE_CODES)
EPSILON = 1e-5  # added to the standard deviation, as in the code of Jie et al.


_BOOKS: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # cache: one copy per device


def code_book(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the codes [K], ascending, and the boundaries between them [K - 1], float32."""
    # a cache would be a side effect, which breaks the graph
    if torch.compiler.is_compiling():
        return _code_book(bits, device)
    book = _BOOKS.get((bits, device))
    if book is None:
        book = _code_book(bits, device)
        if type(book[0]) is Tensor:  # not a FakeTensor of a dry run, which has no values
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
    """Return the number of the code nearest to each entry of `Z`, int64 in Z's shape."""
    return torch.bucketize(Z, code_book(bits, Z.device)[1])


def quantize_each(W_LN: Tensor, bits: int) -> Tensor:
    """Quantize each row with its own mean and deviation: `sigma * code + mu`, float32 [L, N].

    The gradient treats rounding as the identity (straight-through) and flows through mu and sigma.
    """
    W_LN = W_LN.float()
    # the unbiased deviation (N - 1), as in the authors' code
    sigma, mu = torch.std_mean(W_LN, dim=1, keepdim=True)
    Z_LN = (W_LN - mu) / (sigma + EPSILON)
    rounded = code_book(bits, W_LN.device)[0][nearest(Z_LN.detach(), bits)]
    # straight-through: Z - Z.detach() is exactly 0 and has the gradient of Z
    return sigma * (rounded + (Z_LN - Z_LN.detach())) + mu


def quantize(W: Tensor, bits: int) -> Tensor:
    """Quantize `W`, of any shape, as one matrix."""
    return quantize_each(W.reshape(1, -1), bits).view(W.shape)


def encode(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return `quantize(W)` as packed codes, uint8 [ceil(N bits / 8)], and float32 [mu, sigma]."""
    W_1N = W.detach().float().reshape(1, -1)
    sigma, mu = torch.std_mean(W_1N, dim=1, keepdim=True)
    numbers = nearest((W_1N - mu) / (sigma + EPSILON), bits)
    return pack(numbers.view(-1), bits), torch.cat([mu, sigma]).view(2)


def decode(packed: Tensor, stats: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """Return the float32 weights of `shape` that `encode` has packed."""
    mu, sigma = stats
    return (sigma * codes_of(packed, shape, bits) + mu).view(shape)


def decode_latent(packed: Tensor, stats: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """Return latent weights to resume training from, whose quantized values are `decode`'s.

    Rounding reduces the standard deviation (to 0.67 at one bit), so the codes are rescaled to the
    mean and deviation in `stats`. If all weights have the same code, `decode`'s are returned.
    """
    codes = codes_of(packed, shape, bits)
    mu, sigma = stats
    code_sigma, code_mu = torch.std_mean(codes)
    if code_sigma == 0:
        return decode(packed, stats, shape, bits)
    return (sigma * ((codes - code_mu) / code_sigma) + mu).view(shape)


def codes_of(packed: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """Return the codes [N] of the weights of `shape`."""
    return code_book(bits, packed.device)[0][unpack(packed, shape.numel(), bits)]


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes of `count` packed codes."""
    return -(-count * bits // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers below 2^bits [N] into bytes, uint8; the last one is padded with zeros."""
    per_byte = 8 // bits
    missing = -len(numbers) % per_byte
    columns = torch.nn.functional.pad(numbers, (0, missing)).view(-1, per_byte)
    return (columns << shifts(bits, numbers.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Return the first `count` numbers in `packed`, int64."""
    numbers = packed.long().unsqueeze(1) >> shifts(bits, packed.device) & (2**bits - 1)
    return numbers.view(-1)[:count]


def shifts(bits: int, device: torch.device) -> Tensor:
    """Return the bit position of each number in a byte."""
    return torch.arange(0, 8, bits, device=device)
