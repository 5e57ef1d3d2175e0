"""Positions of the largest entries of a matrix beside its low-rank part, and products with them.

GreBsmo: Zhou and Tao 2013, "Greedy Bilateral Sketch, Completion and Smoothing", AISTATS: minimizes
||W - U V - S||_F with rank(U V) <= K and at most N entries in S, by turns, while the rank grows.

Shapes: I in, O out, K rank, N entries, T tokens. Positions are flat (`row * I + column`) and
ascending.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GROWTH = 5  # rows that V gains at a time
ROUNDS = 2  # updates of U, V and S between two of them


@torch.no_grad()
def greedy_positions(weight: Tensor, count: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return the positions of S [N], int64, for a weight [O, I].

    The cardinality of S is given, as in the paper; the published code has a threshold instead.

    Args:
        weight: W, on any device; computed in float32 there.
        count: N.
        rank: K, from 1.
        generator: on the CPU, of the first row of V.
    """
    W = weight.detach().float()
    V_KI = torch.randn(1, W.shape[1], generator=generator).to(W.device)
    rank = min(rank, *W.shape)
    sparse = torch.zeros_like(W)
    while True:
        for _ in range(ROUNDS):
            dense = W - sparse
            U_OK = torch.linalg.qr(dense @ V_KI.t()).Q
            V_KI = U_OK.t() @ dense
            residual = W - U_OK @ V_KI
            positions = largest_positions(residual, count)
            sparse = torch.zeros_like(W)
            sparse.view(-1)[positions] = residual.view(-1)[positions]
        if len(V_KI) >= rank:
            return positions
        left = residual - sparse
        step = min(GROWTH, rank - len(V_KI))
        # the first rows of R of the complete QR follow from the first columns alone
        Q_OG = torch.linalg.qr(left[:, :step]).Q
        V_KI = torch.cat([V_KI, Q_OG.t() @ left])


def largest_positions(matrix: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` entries of largest magnitude, ascending."""
    return matrix.detach().abs().reshape(-1).topk(count, sorted=False).indices.sort().values


def add_entries(y: Tensor, x: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Return `y + scale * x S^T`, [..., O], for S [O, I] with these values [N] at these positions.

    The output is y, changed in place; S is never formed, and no copy of x is kept for backward.

    Args:
        y: [..., O], which has no other holder.
        x: [..., I], in the dtype of y.
        values: [N], in any floating-point dtype.
        positions: [N], of S, flat.
        scale: of the update.
    """
    return _AddEntries.apply(y, x, values, positions, scale)


def _split(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    at = positions.long()
    return at // width, at % width


class _AddEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, values: Tensor, positions: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, values, positions)
        ctx.scale = scale
        ctx.mark_dirty(y)
        rows, columns = _split(positions, x.shape[-1])
        x_TN = x.reshape(-1, x.shape[-1]).index_select(1, columns)
        y.view(-1, y.shape[-1]).index_add_(1, rows, x_TN * values.to(x.dtype), alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, positions = ctx.saved_tensors
        rows, columns = _split(positions, x.shape[-1])
        g_TN = grad.reshape(-1, grad.shape[-1]).index_select(1, rows)
        to_x = to_values = None
        if ctx.needs_input_grad[1]:
            to_x = torch.zeros_like(x).view(-1, x.shape[-1])
            to_x.index_add_(1, columns, g_TN * values.to(x.dtype), alpha=ctx.scale)
            to_x = to_x.view(x.shape)
        if ctx.needs_input_grad[2]:
            x_TN = x.reshape(-1, x.shape[-1]).index_select(1, columns)
            to_values = (ctx.scale * (g_TN * x_TN).sum(0, dtype=torch.float32)).to(values.dtype)
        return grad, to_x, to_values, None, None
