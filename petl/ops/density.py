"""A smooth count of values that are not zero: `h(a) = a^2 / (a^2 + eps)`, or 1 - eps / (a^2 + eps).

Shapes: N values in rows of F neurons. Everything is in float32, a chunk at a time, and nothing is
kept: the literal formula leaves two float32 tensors of the activation's size for backward.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = {"cpu": 2**16}  # values that stay in cache; elsewhere few large kernels are better
LARGE_CHUNK = 2**23


def count_nonzero(a: Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """The sum of `h(a)`, 0-d: over all of a [..., F], or the rows where `mask` [rows] is 1."""
    flat, total = a.detach().reshape(-1, a.shape[-1]), a.new_zeros((), dtype=torch.float32)
    for start, stop in _chunks(flat):
        zeros = flat[start:stop].float().square().add_(eps).reciprocal_().mul_(eps)
        if mask is None:
            total += zeros.numel() - zeros.sum()
        else:
            weight = mask[start:stop].float()
            total += weight.sum() * zeros.shape[1] - (zeros.sum(1) * weight).sum()
    return total


def add_slope(
    grad: Tensor, a: Tensor, eps: float, factor: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`grad + factor * h'(a)`, with `h'(a) = 2 a eps / (a^2 + eps)^2`; in the dtype of `grad`.

    Args:
        factor: 0-d.
        mask: [rows]; where it is 0 nothing is added.
    """
    flat, out = a.reshape(-1, a.shape[-1]), grad.reshape(-1, grad.shape[-1]).clone()
    factor = 2 * eps * factor
    for start, stop in _chunks(flat):
        part = flat[start:stop].float()
        inverse = part.square().add_(eps).reciprocal_()
        # in this order nothing leaves float32's range, however small eps is
        slope = (part * inverse).mul_(inverse * factor)
        if mask is not None:
            slope *= mask[start:stop, None]
        out[start:stop] += slope
    return out.view(grad.shape)


def _chunks(flat: Tensor) -> Iterator[tuple[int, int]]:
    rows = max(1, CHUNK.get(flat.device.type, LARGE_CHUNK) // max(1, flat.shape[1]))
    return ((i, min(i + rows, len(flat))) for i in range(0, len(flat), rows))
