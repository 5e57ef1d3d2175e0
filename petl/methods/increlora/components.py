"""Slice the first components of a low-rank update and weight them, with a fused backward.

Shapes: I in, O out, C components allocated, R of them in use, L of these with a learned weight.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from petl.ops import Ctx

# an additional gradient: of A [R, I], of B [O, R], and two factors, a 0-d tensor and a number
Pull = tuple[Tensor, Tensor, Tensor, float]


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
    """Return the first `count` rows of A times their weights, [R, I], and columns of B, [O, R].

    Components that are not in use get gradients of zero.

    Args:
        A: [C, I].
        B: [O, C].
        E: [C, 1], the learned weights.
        live: L, the number of components whose weight is E.
        count: R, the number of components in use.
        rest: the weight of the components from L to R.
        pull: additional gradients of A and B in backward, from a loss term that does not depend on
            the layer's output, each multiplied by both factors; None: none.
    """
    # without gradients there is nothing to fuse
    if torch.is_grad_enabled():
        return _FirstComponents.apply(A, B, E, (live, count, rest), pull)
    return _weights(E, live, count, rest) * A[:count], B[:, :count]


def _weights(E: Tensor, live: int, count: int, rest: float) -> Tensor:
    return F.pad(E[:live], (0, 0, 0, count - live), value=rest) if count > live else E[:live]


class _FirstComponents(torch.autograd.Function):
    """Slices and product as one autograd function, with half the kernel launches."""

    @staticmethod
    def forward(
        ctx: Ctx,
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
    def backward(ctx: Ctx, to_rows: Tensor, to_B: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        A, E, pull_A, pull_B, scale = ctx.saved_tensors
        live, count, _ = ctx.size
        # the product rule: rows are E * A
        to_A = _weights(E, *ctx.size) * to_rows
        to_E = (to_rows[:live] * A[:live]).sum(1, keepdim=True)
        if pull_A is not None:
            to_A = torch.addcmul(to_A, pull_A, scale.to(to_A), value=ctx.factor)
            to_B = torch.addcmul(to_B, pull_B, scale.to(to_B), value=ctx.factor)
        if live < len(A):
            to_E = F.pad(to_E, (0, 0, 0, len(A) - live))
        if (unused := len(A) - count) > 0:
            to_A, to_B = F.pad(to_A, (0, 0, 0, unused)), F.pad(to_B, (0, unused))
        return to_A, to_B, to_E, None, None
