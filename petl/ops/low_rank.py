"""Low-rank products beside a frozen linear layer.

Shapes: I in, O out, R rank, T tokens. The update B A [O, I] is never formed in a forward pass.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def project_down(x: Tensor, A: Tensor) -> Tensor:
    """`x A^T`: [..., I] and A [R, I] to [T, R], in the dtype of `x`."""
    return F.linear(x.reshape(-1, x.shape[-1]), A.to(x.dtype))


def add_up(y: Tensor, h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """`y + scale * h B^T`: y [..., O], h [T, R], B [O, R], in the dtype of `y`."""
    flat = y.reshape(-1, y.shape[-1])
    return torch.addmm(flat, h.to(y.dtype), B.to(y.dtype).t(), alpha=scale).view(y.shape)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`y + scale * (x A^T) B^T`: y [..., O], x [..., I], A [R, I], B [O, R]."""
    return add_up(y, project_down(x, A), B, scale)
