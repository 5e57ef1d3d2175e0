"""The first components of a low-rank update, each with its weight.

Shapes: I in, O out, C components there are, R of them in use, L of these with a weight that learns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pull = tuple[Tensor, Tensor, Tensor, float]  # [R, I], [O, R], a 0-d factor and a plain one


def first_components(
    A: Tensor,
    B: Tensor,
    E: Tensor,
    live: int,
    count: int,
    *,
    rest: float,
    pull: Pull | None = None,
) -> tuple[Tensor, Tensor]:
    """The first `count` rows of A [C, I] times their weights, [R, I], and columns of B [O, C].

    The weights are E [C, 1] for the first `live` ones and `rest` for those behind them. Components
    that are not in use have gradients of zero.

    Args:
        pull: what a term of the loss that this layer's output does not know of adds to the
            gradients of A and B in backward, each multiplied by both factors.
    """
    if torch.is_grad_enabled():
        return _FirstComponents.apply(A, B, E, (live, count, rest), pull)
    return _weights(E, live, count, rest) * A[:count], B[:, :count]


def _weights(E: Tensor, live: int, count: int, rest: float) -> Tensor:
    return F.pad(E[:live], (0, 0, 0, count - live), value=rest) if count > live else E[:live]


class _FirstComponents(torch.autograd.Function):
    """What slices and a product would do, in half the calls."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        E: Tensor,
        size: tuple[int, int, float],
        pull: Pull | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.size = size
        *tensors, ctx.factor = pull or (None, None, None, 0.0)
        ctx.save_for_backward(A, E, *tensors)
        count = size[1]
        return _weights(E, *size) * A[:count], B[:, :count]

    @staticmethod
    def backward(ctx: Any, to_rows: Tensor, to_B: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        A, E, pull_A, pull_B, scale = ctx.saved_tensors
        live, count, _ = ctx.size
        to_A = _weights(E, *ctx.size) * to_rows
        to_E = (to_rows[:live] * A[:live]).sum(1, keepdim=True)
        if pull_A is not None:
            to_A = torch.addcmul(to_A, pull_A, scale.to(to_A), value=ctx.factor)
            to_B = torch.addcmul(to_B, pull_B, scale.to(to_B), value=ctx.factor)
        if live < len(A):
            to_E = F.pad(to_E, (0, 0, 0, len(A) - live))
        if (spare := len(A) - count) > 0:
            to_A, to_B = F.pad(to_A, (0, 0, 0, spare)), F.pad(to_B, (0, spare))
        return to_A, to_B, to_E, None, None
