"""How far rows are from orthonormal."""

from typing import Any

import torch
from torch import Tensor


class _GramDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, M: Tensor) -> Tensor:
        with torch.autocast(M.device.type, enabled=False):
            gap = M @ M.t()
        gap.diagonal().sub_(1)
        norm = torch.linalg.vector_norm(gap)
        ctx.save_for_backward(M, gap, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # ty: ignore[incompatible-method-override]
        M, gap, norm = ctx.saved_tensors
        slope = 2 * grad / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        with torch.autocast(M.device.type, enabled=False):
            return slope * (gap @ M)


def gram_distance(M: Tensor) -> Tensor:
    """The Frobenius norm `||M M^T - 1||` of M [R, I], 0-d; its gradient is 0 where it is 0."""
    return _GramDistance.apply(M)
