"""A frozen, possibly masked linear layer with a low-rank update and single entries.

Shapes: I in, O out, R rank, N entries, T tokens. With the frozen weight W, its mask m, factors
A [R, I], B [O, R] and values s [N] at (row, column):

    y = x (m W)^T + b + c ((x A^T) B^T + S x),  S[row_n, column_n] = s_n

S [O, I] is never formed, forward or backward: its entries take 2 T N operations. Nothing of the
size of the weight is kept for backward but what the caller holds anyway.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petl.ops import Ctx, packed
from petl.ops.low_rank import add_low_rank
from petl.ops.masks import mask_factors


class SparseUpdate(NamedTuple):
    """The trained part of a layer: A [R, I], B [O, R], values [N] at rows [N] and columns [N].

    `scale` is c, the factor of both parts.
    """

    A: Tensor
    B: Tensor
    values: Tensor
    rows: Tensor
    columns: Tensor
    scale: float

    def dense(self) -> Tensor:
        """Return D = c (B A + S), [O, I]."""
        total = self.B @ self.A
        return self.scale * total.index_put((self.rows, self.columns), self.values, accumulate=True)


class Frozen(NamedTuple):
    """The frozen part of a layer.

    Attributes:
        weight: W [O, I].
        bias: [O] or None.
        packed: the packed mask, or None if it is all ones.
        masked: m W [O, I] in the dtype of the products, if the caller keeps it; else None.
    """

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None = None
    masked: Tensor | None = None

    def product_weight(self, dtype: torch.dtype) -> Tensor:
        """Return m W [O, I] in a dtype."""
        if self.masked is not None:
            return self.masked
        return masked_weight(self.weight, self.packed).to(dtype)


def masked_weight(weight: Tensor, packed: Tensor | None) -> Tensor:
    """Return m W for a weight [O, I] and a packed mask, None for ones; differentiable in W."""
    if packed is None:
        return weight
    return weight * mask_factors(packed, tuple(weight.shape), weight.dtype)


def add_update(y: Tensor, x: Tensor, update: SparseUpdate) -> Tensor:
    """Return `y + x D^T`, [..., O], for y [..., O] and x [..., I], by operations of torch."""
    A, B, values, rows, columns, scale = update
    y = add_low_rank(y, x, A, B, scale)
    picked = x.index_select(-1, columns) * values.to(x.dtype)
    return y.index_add(-1, rows, picked.to(y.dtype), alpha=scale)


def updated_linear(x: Tensor, frozen: Frozen, update: SparseUpdate | None) -> Tensor:
    """Return `x (m W + D)^T + b`, [..., O], in the dtype of x; gradients go to x and the update.

    Args:
        x: [..., I], in the dtype of the products.
        frozen: weight, bias and mask.
        update: D, or None for none.
    """
    needs = torch.is_grad_enabled() and (
        x.requires_grad or (update is not None and update.A.requires_grad)
    )
    # x has the dtype of the products already
    with torch.autocast(x.device.type, enabled=False):
        if not needs:
            return _forward(x, frozen, update)[0]
        tensors = (None,) * 3 if update is None else update[:3]
        return _UpdatedLinear.apply(x, *tensors, frozen, update)


def _forward(
    x: Tensor, frozen: Frozen, update: SparseUpdate | None
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and A x^T [R, T]; ranks are rows, as in petl/ops/low_rank.py."""
    x_TI = x.reshape(-1, x.shape[-1])
    weight = frozen.product_weight(x.dtype)
    bias = None if frozen.bias is None else frozen.bias.to(x.dtype)
    y_TO = packed.linear(x_TI, weight, bias)
    h_RT = None
    if update is not None:
        A, B, values, rows, columns, scale = update
        h_RT = A.to(x.dtype) @ x_TI.t()
        y_TO.addmm_(h_RT.t(), B.to(x.dtype).t(), alpha=scale)
        picked_TN = x_TI.index_select(1, columns).mul_(values.to(x.dtype))
        y_TO.index_add_(1, rows, picked_TN, alpha=scale)
    return y_TO.view(*x.shape[:-1], len(weight)), h_RT


class _UpdatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        values: Tensor | None,
        frozen: Frozen,
        update: SparseUpdate | None,
    ) -> Tensor:
        y, h_RT = _forward(x, frozen, update)
        # without an update only the gradient of x is computed, which does not need x
        kept = None if update is None else x
        ctx.save_for_backward(kept, A, B, values, frozen.weight, frozen.masked, h_RT)
        # not in save_for_backward, which checks versions: DDP rewrites buffers before each forward
        ctx.packed, ctx.shape, ctx.dtype = frozen.packed, x.shape, x.dtype
        ctx.at = None if update is None else update[3:]
        return y.detach()  # no view, as in `_LowRankLinear`

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, weight, masked, h_RT = ctx.saved_tensors
        g_TO = grad.reshape(-1, grad.shape[-1])
        to_x = to_A = to_B = to_values = None
        if ctx.needs_input_grad[0]:
            frozen = Frozen(weight, None, ctx.packed, masked)
            to_x = g_TO @ frozen.product_weight(ctx.dtype)
        if A is not None:
            rows, columns, scale = ctx.at
            x_TI, b = x.reshape(-1, x.shape[-1]), B.to(ctx.dtype)
            u_RT = scale * (b.t() @ g_TO.t())
            g_TN = g_TO.index_select(1, rows)
            if ctx.needs_input_grad[3]:
                products_TN = g_TN * x_TI.index_select(1, columns)
                to_values = (scale * products_TN.sum(0, dtype=values.dtype)).to(values.dtype)
            if to_x is not None:
                to_x.addmm_(u_RT.t(), A.to(ctx.dtype))
                to_x.index_add_(1, columns, g_TN * values.to(ctx.dtype), alpha=scale)
            if ctx.needs_input_grad[1]:
                to_A = (u_RT @ x_TI).to(A.dtype)
            if ctx.needs_input_grad[2]:
                to_B = (scale * (h_RT @ g_TO)).t().to(B.dtype)
        to_x = None if to_x is None else to_x.view(ctx.shape)
        return to_x, to_A, to_B, to_values, None, None
