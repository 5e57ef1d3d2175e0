"""Frozen linear layers fused with low-rank updates, in few passes over the activations.

Shapes: I in, O out, R rank, T tokens. The update B A [O, I] is never formed in a forward pass.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from petl.ops import Ctx, packed
from petl.ops.dropout import keep_mask
from petl.ops.expert_linear import ExpertLinear

WEIGHT_TYPES = (nn.Parameter, Tensor, FakeTensor)  # FakeTensor: a dry run must compute the same
LINEAR = (
    nn.Linear,
    packed.PackedLinear,
    packed.CastLinear,
    packed.HeldLinear,
    ExpertLinear,
)  # exactly these: a subclass may compute something else


def is_frozen_linear(
    base: nn.Module, weight_types: tuple[type, ...] = (nn.Parameter, Tensor)
) -> bool:
    """Return True for an nn.Linear or Conv1D with frozen weight and bias and without hooks.

    The weight must be of one of `weight_types`; that of a sharded or quantized layer is not.
    """
    if type(base) not in (*LINEAR, Conv1D) or not has_no_hooks(base):
        return False
    # not `parameters()`: while FSDP1 recomputes a block, its weights are plain attributes
    weight, bias = base.weight, base.bias
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    return type(weight) in weight_types and not trains


def hooks_of(module: nn.Module) -> list[Callable[..., object]]:
    """Return the hooks of a module that run with its passes; torch has no public list of them."""
    return [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]


def has_no_hooks(module: nn.Module) -> bool:
    """Return True if a call of a module runs its class's `forward` alone: no hooks, no override."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def call_with_weight(
    base: nn.Module, weight: Tensor, x: Tensor, *args: object, **kwargs: object
) -> Tensor:
    """Call an nn.Linear or Conv1D, whose hooks run, with `weight` [O, I] in place of its own."""
    stored, own = weight.t() if isinstance(base, Conv1D) else weight, vars(base)
    if "weight" not in own:
        return functional_call(base, {"weight": stored}, (x, *args), kwargs)
    # under FSDP1 it is a plain attribute, which functional_call does not replace
    before, own["weight"] = own["weight"], stored
    try:
        return base(x, *args, **kwargs)
    finally:
        own["weight"] = before


def owns_output(base: nn.Module) -> bool:
    """Return True if a layer's output is a new tensor that only the caller holds.

    It may then be overwritten in place.
    """
    return type(base) in LINEAR and has_no_hooks(base) and not torch.compiler.is_compiling()


def frozen_weight_and_bias(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return weight [O, I] and bias of a frozen nn.Linear, or None for any other layer.

    The weight may be in the dtype of the product already.
    None under torch.compile, too, which fuses a layer and its adapter by itself, and if x has
    another dtype than the weight (without autocast), for which the layer itself would raise.
    """
    if (
        type(base) not in LINEAR
        or torch.compiler.is_compiling()
        or not is_frozen_linear(base, WEIGHT_TYPES)
    ):
        return None
    weight, bias = cast(Any, base).weight, cast(Any, base).bias
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    return weight_for(base, product_dtype(x)), bias


def weight_for(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight of a linear layer, in a dtype if it keeps it in that."""
    return layer.weight_in(dtype) if isinstance(layer, packed.CastLinear) else layer.weight


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes for `x`, which autocast may change."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


class _SharedCast(torch.autograd.Function):
    """A cast that other products of the same tensor keep for backward, too."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return cast.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None  # each product's own: the sum of them is not rounded


class _LastCast(NamedTuple):
    """What was cast last, which the next products of it read: queries, keys and values."""

    source: "weakref.ref[Tensor]"
    version: int
    cast: Tensor

    def of(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the cast of `x`, if it was this one and has not changed since."""
        is_same = self.source() is x and self.version == x._version and self.cast.dtype == dtype
        return self.cast if is_same else None


_last: _LastCast | None = None


def _forget(source: "weakref.ref[Tensor]") -> None:
    global _last
    if _last is not None and _last.source is source:
        _last = None


def cast_for_product(x: Tensor) -> Tensor:
    """Return `x` in `product_dtype(x)`; where backward keeps it, one copy for all of its products.

    Autocast would make and keep a copy for each.
    """
    global _last
    dtype = product_dtype(x)
    is_kept = x.dtype != dtype and x.requires_grad and torch.is_grad_enabled()
    if not is_kept or torch.compiler.is_compiling():
        return x.to(dtype)
    found = None if _last is None else _last.of(x, dtype)
    if found is None:
        found = x.detach().to(dtype)
        _last = _LastCast(weakref.ref(x, _forget), x._version, found)
    return _SharedCast.apply(x, found)


def linear_with_low_rank(
    x: Tensor, base: nn.Module, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor | None:
    """Return `base(x) + scale * (drop(x) A^T) B^T`, [..., O], fused if `base` allows it.

    Args:
        x: [..., I].
        base: the layer.
        A: [R, I].
        B: [O, R].
        scale: of the update.
        dropout: probability with which entries of x are dropped before A, in [0, 1).

    Returns:
        The output, or None if nothing can be fused: then call `base` and add the update.
    """
    # inference: in decoding, the number of kernel launches dominates
    if not torch.is_grad_enabled() and dropout == 0:
        return add_low_rank_(base(x), x, A, B, scale) if owns_output(base) else None
    # with gradients: one autograd function for both
    frozen = frozen_weight_and_bias(base, x)
    if frozen is None:
        return None
    return low_rank_linear(cast_for_product(x), frozen, A, B, scale, dropout=dropout)


def project_down(x: Tensor, A: Tensor) -> Tensor:
    """Return `x A^T`, [T, R], for x [..., I] and A [R, I], in the dtype of `x`."""
    return F.linear(x.reshape(-1, x.shape[-1]), A.to(x.dtype))


def add_up(y: Tensor, h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return `y + scale * h B^T` for y [..., O], h [T, R], B [O, R], in the dtype of `y`."""
    flat = y.reshape(-1, y.shape[-1])
    return torch.addmm(flat, h.to(y.dtype), B.to(y.dtype).t(), alpha=scale).view(y.shape)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return `y + scale * (x A^T) B^T` for y [..., O], x [..., I], A [R, I], B [O, R]."""
    return add_up(y, project_down(x, A), B, scale)


def add_low_rank_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Add `scale * (x A^T) B^T` to `y` in place, which has no graph and no other holder.

    It uses the products of `low_rank_linear`, so that the first forward pass of reentrant
    checkpointing (without gradients) and its recomputation are bit-exact.
    """
    h_RT = A.to(x.dtype) @ x.reshape(-1, x.shape[-1]).t()
    y.view(-1, y.shape[-1]).addmm_(h_RT.t().to(y.dtype), B.to(y.dtype).t(), alpha=scale)
    return y


class LowRankRows(NamedTuple):
    """Low-rank updates of G groups of rows: `A` [G, R, I], `B` [G, O, R], `scale` [G, 1, 1]."""

    A: Tensor
    B: Tensor
    scale: Tensor

    @classmethod
    def stack(
        cls, factors: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype
    ) -> "LowRankRows | None":
        """Stack A [r, I], B [O, r] and scale of each group, padded with zeros to the largest r.

        Returns:
            None if more than half of the result would be padding.
        """
        A, B, scales = zip(*factors, strict=True)
        ranks = [len(A_RI) for A_RI in A]
        R = max(ranks)
        # padding is computed like the rest
        if R * len(ranks) > 2 * sum(ranks):
            return None
        if min(ranks) < R:
            A = [F.pad(A_RI, (0, 0, 0, R - len(A_RI))) for A_RI in A]
            B = [F.pad(B_OR, (0, R - B_OR.shape[1])) for B_OR in B]
        scale = torch.tensor(scales, dtype=dtype, device=A[0].device).view(-1, 1, 1)
        return cls(torch.stack(A).to(dtype), torch.stack(B).to(dtype), scale)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the updates for x [G, T, I] to `y` [G, T, O], in place, in two products."""
        # rank as rows, as in `_LowRankLinear`
        h_GRT = torch.bmm(self.A, x.mT) * self.scale
        return y.baddbmm_(h_GRT.mT.to(y.dtype), self.B.to(y.dtype).mT)


def low_rank_linear(
    x: Tensor,
    frozen: tuple[Tensor, Tensor | None],
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    gate: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return `x W^T + bias + scale * (drop(x) A^T) B^T`, [..., O], in the dtype of `x` [..., I].

    One autograd function for a frozen linear layer and its update: no tensor of the size of x or of
    the output is created twice, in forward or backward, and backward recomputes the results of
    dropout and gate instead of saving them. Gradients go to x, A, B and the gate.

    Args:
        x: [..., I].
        frozen: weight [O, I] and bias [O] or None; they get no gradient.
        A: [R, I].
        B: [O, R].
        scale: of the update.
        gate: [T, E], factors of the R rows of (x A^T)^T, R / E consecutive rows each; None: 1.
        dropout: probability with which entries of x are dropped before A, in [0, 1).
    """
    mask = None
    if dropout > 0:
        mask, mean = keep_mask(x, dropout)
        scale /= mean
    # x has the dtype of the products already
    with torch.autocast(x.device.type, enabled=False):
        return _LowRankLinear.apply(x, A, B, gate, (*frozen, mask), scale)


class _LowRankLinear(torch.autograd.Function):
    """The thin products have rank or output as rows: measured, up to five times faster so."""

    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        frozen: tuple[Tensor, Tensor | None, Tensor | None],
        scale: float,
    ) -> Tensor:
        weight, bias, mask = frozen
        x_TI = x.reshape(-1, x.shape[-1])
        bias = None if bias is None else bias.to(x.dtype)
        product = packed.linear if packed.in_use else F.linear
        y_TO = product(x_TI, weight.to(x.dtype), bias)  # of two dimensions, so no view of another
        h_RT = A.to(x.dtype) @ _masked(x_TI, mask).t()
        y_TO.addmm_(_gated(h_RT, gate).t(), B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, A, B, gate, weight, mask, h_RT)
        ctx.scale = scale
        # detached: autograd forbids to change a view that was made here in place, and models do
        return y_TO.view(*x.shape[:-1], len(weight)).detach()

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        x, A, B, gate, weight, mask, h_RT = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        g_TO = grad.reshape(-1, grad.shape[-1])
        # recomputed: the mask takes a byte per value, less than the product
        dropped_TI = _masked(x.reshape(-1, x.shape[-1]), mask)
        if torch.is_grad_enabled():  # double backward: the saved h has no graph
            h_RT = a @ dropped_TI.t()
        u_RT = _scaled_product(ctx.scale, b.t(), g_TO.t())
        to_x = to_A = to_B = to_gate = None
        if gate is not None and ctx.needs_input_grad[3]:
            to_gate = (u_RT * h_RT).unflatten(0, (gate.shape[1], -1)).sum(1).t().to(gate.dtype)
        # after the gradient of the gate, which needs u without it
        u_RT = _gated(u_RT, gate)
        if ctx.needs_input_grad[0]:
            # through the frozen layer; the update's part is added in place
            to_x = g_TO @ weight.to(x.dtype)
            if mask is None:
                to_x.addmm_(u_RT.t(), a)
            else:
                to_x += _masked(u_RT.t() @ a, mask)
            to_x = to_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            to_A = (u_RT @ dropped_TI).to(A.dtype)
        if ctx.needs_input_grad[2]:
            to_B = _scaled_product(ctx.scale, _gated(h_RT, gate), g_TO).t().to(B.dtype)
        return to_x, to_A, to_B, to_gate, None, None


def _scaled_product(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """Return `scale * left @ right` in one kernel: with beta=0 addmm does not read the summand."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _masked(x_TI: Tensor, mask: Tensor | None) -> Tensor:
    return x_TI if mask is None else x_TI * mask.view(x_TI.shape)


def _gated(h_RT: Tensor, gate_TE: Tensor | None) -> Tensor:
    if gate_TE is None:
        return h_RT
    gate_E1T = gate_TE.t().to(h_RT.dtype).unsqueeze(1)
    return (h_RT.unflatten(0, (len(gate_E1T), -1)) * gate_E1T).flatten(0, 1)
