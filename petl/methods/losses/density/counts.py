"""Smooth count of nonzero values: `h(a) = a^2 / (a^2 + eps)` = 1 - eps / (a^2 + eps).

Shapes: N values in rows of F neurons. Computed in float32, chunk by chunk, and nothing is saved for
backward: autograd on the formula would save two float32 tensors of the activation's size.
"""

import torch
from torch import Tensor

# values per chunk: on a CPU a chunk stays in cache, elsewhere few large kernels are faster
CHUNK = {"cpu": 2**17}
LARGE_CHUNK = 2**23


def count_nonzero(a: Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """Return the sum of `h(a)`, 0-d, over a [..., F], or over rows where `mask` [rows] is 1."""
    flat, epsilon = a.detach().reshape(-1, a.shape[-1]), _scalar(eps, a)
    chunks = _chunks(flat)
    # sum 1 - h, which is eps / (a^2 + eps): one pass fewer than a^2 / (a^2 + eps)
    zeros = epsilon.new_empty(len(chunks))
    for chunk, total in zip(chunks, zeros, strict=True):
        shifted = _shifted_square(flat[chunk].float(), epsilon)
        inactive = torch.div(epsilon, shifted, out=shifted)
        if mask is None:
            torch.sum(inactive, (0, 1), out=total)
        else:
            torch.dot(inactive.sum(1), mask[chunk].float(), out=total)
    rows = len(flat) if mask is None else mask.float().sum()
    return rows * flat.shape[1] - zeros.sum()


def add_slope(
    grad: Tensor, a: Tensor, eps: float, factor: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return `grad + factor * h'(a)`, with `h'(a) = 2 a eps / (a^2 + eps)^2`, in grad's dtype.

    Args:
        grad: [..., F].
        a: [..., F].
        eps: above 0.
        factor: 0-d.
        mask: [rows]; where it is 0 nothing is added; None: 1 everywhere.
    """
    flat, before = a.reshape(-1, a.shape[-1]), grad.reshape(-1, grad.shape[-1])
    after, epsilon, factor = torch.empty_like(before), _scalar(eps, a), 2 * eps * factor
    for chunk in _chunks(flat):
        part = flat[chunk].float()
        shifted = _shifted_square(part, epsilon)
        # divided twice: (a^2 + eps)^2 would underflow in float32 for small eps
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
    """Return slices of equally many rows, with about CHUNK values each."""
    count = max(1, round(flat.numel() / CHUNK.get(flat.device.type, LARGE_CHUNK)))
    rows = max(1, -(-len(flat) // count))
    return [slice(i, i + rows) for i in range(0, len(flat), rows)]
