"""Quantized weights: a code for each entry, and mean and standard deviation for each matrix.

Shapes: L matrices, N entries each, K = 2^bits codes. In packed form, entry i (row-major) has the
number of its code (0 is the smallest) at bit `bits * (i % per)` of byte `i // per`, with
`per = 8 / bits` codes in a byte, lowest bits first.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from petl.errors import InputError
from petl.ops import Ctx
from petl.system.values import bounded, one_of

# Code books of 1, 2, 4 and 8 bits with minimal expected absolute error for a standard normal. Each
# code is the median of its cell and each boundary is midway between two codes. The books are
# symmetric; these are the positive halves, solved to 1e-14 by Newton's method and rounded.
# fmt: off
POSITIVE_CODES = {
    1: (0.674489750,),
    2: (0.377754161, 1.265720325),
    4: (
        0.105550285, 0.319036008, 0.540072077, 0.775192072, 1.034006305, 1.333106708, 1.707737593,
        2.265490638,
    ),
    8: (
        0.006899625, 0.020699532, 0.034501411, 0.048306576, 0.062116346, 0.075932042, 0.089754988,
        0.103586515, 0.117427958, 0.131280659, 0.145145967, 0.159025242, 0.172919850, 0.186831171,
        0.200760594, 0.214709521, 0.228679368, 0.242671565, 0.256687558, 0.270728810, 0.284796801,
        0.298893030, 0.313019018, 0.327176307, 0.341366459, 0.355591065, 0.369851737, 0.384150117,
        0.398487874, 0.412866707, 0.427288349, 0.441754563, 0.456267150, 0.470827944, 0.485438824,
        0.500101703, 0.514818542, 0.529591345, 0.544422163, 0.559313099, 0.574266306, 0.589283994,
        0.604368429, 0.619521939, 0.634746915, 0.650045817, 0.665421175, 0.680875591, 0.696411749,
        0.712032412, 0.727740433, 0.743538753, 0.759430413, 0.775418551, 0.791506416, 0.807697368,
        0.823994886, 0.840402577, 0.856924179, 0.873563571, 0.890324784, 0.907212002, 0.924229581,
        0.941382050, 0.958674132, 0.976110744, 0.993697019, 1.011438317, 1.029340238, 1.047408638,
        1.065649648, 1.084069692, 1.102675509, 1.121474169, 1.140473106, 1.159680136, 1.179103492,
        1.198751850, 1.218634368, 1.238760721, 1.259141144, 1.279786476, 1.300708213, 1.321918561,
        1.343430503, 1.365257863, 1.387415385, 1.409918822, 1.432785029, 1.456032070, 1.479679347,
        1.503747731, 1.528259722, 1.553239627, 1.578713763, 1.604710689, 1.631261477, 1.658400017,
        1.686163380, 1.714592235, 1.743731340, 1.773630118, 1.804343343, 1.835931955, 1.868464038,
        1.902015999, 1.936674012, 1.972535779, 2.009712721, 2.048332712, 2.088543544, 2.130517357,
        2.174456384, 2.220600516, 2.269237428, 2.320716381, 2.375467446, 2.434028947, 2.497087749,
        2.565540424, 2.640589886, 2.723905625, 2.817905936, 2.926294899, 3.055194981, 3.215910229,
        3.433372489, 3.785401157,
    ),
}
# fmt: on


BITS = tuple(POSITIVE_CODES)
# bits of a code up to which, and entries from which, bounds are counted and not searched on a CPU
SEARCHED, MANY = 4, 1 << 14
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
    bounds = code_book(bits, Z.device)[1]
    # on a CPU a search for each entry takes 2 to 12 times as long as to count the few bounds below
    # all of many; elsewhere it is one kernel
    if Z.device.type != "cpu" or bits > SEARCHED or Z.numel() < MANY:
        return torch.bucketize(Z, bounds)
    found = (bounds[0] < Z).byte()
    for bound in bounds[1:]:
        found += bound < Z
    return found.long()


def code_of(numbers: Tensor, bits: int) -> Tensor:
    """Return the codes with these numbers, float32 in their shape."""
    codes = code_book(bits, numbers.device)[0]
    # a quarter of the time of codes[numbers] on a CPU
    return codes.index_select(0, numbers.flatten().long()).view(numbers.shape)


def quantize_each(W_LN: Tensor, bits: int) -> Tensor:
    """Quantize each row with its own mean and deviation: `sigma * code + mu`, float32 [L, N].

    The gradient treats rounding as the identity (straight-through) and flows through mu and sigma.
    """
    W_LN = W_LN.float()
    # the unbiased deviation (N - 1), as in the authors' code
    sigma, mu = torch.std_mean(W_LN, dim=1, keepdim=True)
    Z_LN = (W_LN - mu) / (sigma + EPSILON)
    rounded = code_of(nearest(Z_LN.detach(), bits), bits)
    # straight-through: Z - Z.detach() is exactly 0 and has the gradient of Z
    return sigma * (rounded + (Z_LN - Z_LN.detach())) + mu


def quantize(W: Tensor, bits: int) -> Tensor:
    """Quantize `W`, of any shape, as one matrix."""
    return quantize_each(W.reshape(1, -1), bits).view(W.shape)


def numbers_of(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return `quantize(W)` as numbers of codes, int64 [N], and float32 [mu, sigma]."""
    W_1N = W.detach().float().reshape(1, -1)
    sigma, mu = torch.std_mean(W_1N, dim=1, keepdim=True)
    numbers = nearest((W_1N - mu) / (sigma + EPSILON), bits)
    return numbers.view(-1), torch.cat([mu, sigma]).view(2)


def encode(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return `quantize(W)` as packed codes, uint8 [ceil(N bits / 8)], and float32 [mu, sigma]."""
    numbers, stats = numbers_of(W, bits)
    return pack(numbers, bits), stats


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
    return code_of(unpack(packed, shape.numel(), bits), bits)


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


# Steps on the codes themselves: Malinovskii et al. 2024, "PV-Tuning", arXiv:2405.14852


class _Coded(torch.autograd.Function):
    """`sigma * code + mu`, whose gradient also goes to a buffer of the same shape as it is."""

    @staticmethod
    def forward(
        ctx: Ctx, buffer_LN: Tensor, numbers_LN: Tensor, stats_L2: Tensor, bits: int
    ) -> Tensor:
        mu, sigma = stats_L2.float().unsqueeze(1).unbind(2)
        ctx.save_for_backward(numbers_LN)
        ctx.bits = bits
        # in the order of `decode`, so that a saved adapter has equal values
        return sigma * code_of(numbers_LN, bits) + mu

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:  # ty: ignore[incompatible-method-override]
        (numbers_LN,) = ctx.saved_tensors
        codes_LN = code_of(numbers_LN, ctx.bits)
        return grad, None, torch.stack([grad.sum(1), (grad * codes_LN).sum(1)], 1), None


def coded_each(buffer_LN: Tensor, numbers_LN: Tensor, stats_L2: Tensor, bits: int) -> Tensor:
    """Return `sigma * code + mu` for each row, float32 [L, N].

    With G the gradient at it, mu gets sum(G), sigma sum(G code), and the buffer G.

    Args:
        buffer_LN: what collects the gradient; its values are not read.
        numbers_LN: of the codes.
        stats_L2: mu and sigma of each row.
        bits: of a code.
    """
    return _Coded.apply(buffer_LN, numbers_LN, stats_L2, bits)


def pv_codes(
    codes: Tensor,
    target: Tensor,
    mu: Tensor,
    sigma: Tensor,
    bits: int,
    *,
    fraction: float = 1.0,
    trust: float | None = None,
) -> Tensor:
    """Return numbers of codes after one V step towards `target`, int64 in the shape of `codes`.

    An entry is due if the value nearest to its target is not the one that it has. Of these, the
    ceil(fraction N) with the largest distance between target and value get their nearest code; of
    equal ones those of smaller index.

    Args:
        codes: the numbers of the present codes, of any integer type; not changed.
        target: of each value, in the shape of `codes`.
        mu: mean, 0-d.
        sigma: deviation, 0-d, above 0.
        bits: of a code.
        fraction: the largest share of entries that change, in (0, 1].
        trust: the entries change in that order as long as the norm of the change is at most this
            share of the norm of the present values; the first one always does. None: no bound.

    Raises:
        InputError: a value is not allowed, or `codes` and `target` do not belong together.
    """
    one_of(*BITS).check("bits", bits, int)
    bounded(gt=0, le=1).check("fraction", fraction, float)
    bounded(gt=0).check("trust", trust, float | None)
    if codes.shape != target.shape:
        raise InputError(
            f"target has shape {list(target.shape)} and codes {list(codes.shape)}: give a value "
            "for each code"
        )
    if codes.is_floating_point() or not bool(((codes >= 0) & (codes < 2**bits)).all()):
        raise InputError(
            f"codes of {codes.dtype} are not all integers from 0 to {2**bits - 1}, those of "
            f"bits={bits}"
        )
    stats_12 = torch.stack([mu, sigma]).view(1, 2)
    rows = codes.reshape(1, -1), target.reshape(1, -1)
    return pv_codes_each(*rows, stats_12, bits, fraction=fraction, trust=trust).view(codes.shape)


def pv_codes_each(
    numbers_LN: Tensor,
    target_LN: Tensor,
    stats_L2: Tensor,
    bits: int,
    *,
    fraction: float,
    trust: float | None,
) -> Tensor:
    """Return `pv_codes` of each row, int64 [L, N]; nothing waits for the device."""
    mu, sigma = stats_L2.unsqueeze(1).unbind(2)
    numbers_LN = numbers_LN.long()
    goal_LN = nearest((target_LN - mu) / sigma, bits)
    N = target_LN.shape[1]
    count = math.ceil(fraction * N)
    # all that are due: no order to find
    if count == N and trust is None:
        return goal_LN
    W_LN = sigma * code_of(numbers_LN, bits) + mu
    # The bits of floats of one sign have the order of the floats; below them, the smaller index is
    # the larger number. So no two keys are equal, and every device picks the same entries.
    distance_LN = (target_LN - W_LN).abs().float()
    places_N = torch.arange(N - 1, -1, -1, device=W_LN.device)
    key_LN = distance_LN.view(torch.int32).long() << 32 | places_N
    key_LK, picked_LK = key_LN.where(goal_LN != numbers_LN, -1).topk(count, dim=1)
    before_LK, after_LK = numbers_LN.gather(1, picked_LK), goal_LN.gather(1, picked_LK)
    # fewer may be due than could change
    takes_LK = key_LK >= 0
    if trust is not None:
        moved_LK = (sigma * (code_of(after_LK, bits) - code_of(before_LK, bits))).square().cumsum(1)
        near_LK = moved_LK <= trust**2 * W_LN.square().sum(1, keepdim=True)
        # or a tensor whose smallest change is too large would stop for ever
        near_LK[:, 0] = True
        takes_LK &= near_LK
    return numbers_LN.scatter(1, picked_LK, after_LK.where(takes_LK, before_LK))
