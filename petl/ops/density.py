"""A smooth count of values that are not zero: `h(a) = a^2 / (a^2 + eps)`, or 1 - eps / (a^2 + eps).

Shapes: N values in rows of F neurons. Everything is in float32, a chunk at a time, and nothing is
kept: the literal formula leaves two float32 tensors of the activation's size for backward.
"""

import torch
from torch import Tensor

CHUNK = {"cpu": 2**17}  # values that stay in cache; elsewhere few large kernels are better
LARGE_CHUNK = 2**23


def count_nonzero(a: Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """The sum of `h(a)`, 0-d: over all of a [..., F], or the rows where `mask` [rows] is 1."""
    flat, epsilon = a.detach().reshape(-1, a.shape[-1]), _scalar(eps, a)
    chunks = _chunks(flat)
    zeros = epsilon.new_empty(len(chunks))
    for chunk, total in zip(chunks, zeros, strict=True):
        shifted = _shifted_square(flat[chunk].float(), epsilon)
        silent = torch.div(epsilon, shifted, out=shifted)
        if mask is None:
            torch.sum(silent, (0, 1), out=total)
        else:
            torch.dot(silent.sum(1), mask[chunk].float(), out=total)
    rows = len(flat) if mask is None else mask.float().sum()
    return rows * flat.shape[1] - zeros.sum()


def add_slope(
    grad: Tensor, a: Tensor, eps: float, factor: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`grad + factor * h'(a)`, with `h'(a) = 2 a eps / (a^2 + eps)^2`; in the dtype of `grad`.

    Args:
        factor: 0-d.
        mask: [rows]; where it is 0 nothing is added.
    """
    flat, before = a.reshape(-1, a.shape[-1]), grad.reshape(-1, grad.shape[-1])
    after, epsilon, factor = torch.empty_like(before), _scalar(eps, a), 2 * eps * factor
    for chunk in _chunks(flat):
        part = flat[chunk].float()
        shifted = _shifted_square(part, epsilon)
        # in this order nothing leaves float32's range, however small eps is
        slope = torch.div(factor, shifted).mul_(part)
        if mask is not None:
            slope *= mask[chunk, None]
        torch.addcdiv(before[chunk], slope, shifted, out=after[chunk])
    return after.view(grad.shape)


def _scalar(eps: float, a: Tensor) -> Tensor:
    return torch.full((), eps, device=a.device)


def _shifted_square(part: Tensor, epsilon: Tensor) -> Tensor:
    return torch.addcmul(epsilon, part, part)


def _chunks(flat: Tensor) -> list[slice]:
    """Equal runs of rows, of about CHUNK values each."""
    count = max(1, round(flat.numel() / CHUNK.get(flat.device.type, LARGE_CHUNK)))
    rows = max(1, -(-len(flat) // count))
    return [slice(i, i + rows) for i in range(0, len(flat), rows)]
