"""A frozen linear layer with the low-rank updates of several adapters, for training all of them.

Shapes: K adapters, T tokens of each, I in, O out, R rank. The rows of adapter k are those of index
k, so one product with the base weight serves all of them, and the thin products are batched over k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petl.ops import Ctx
from petl.ops.dropout import keep_mask


def grouped_masks(
    x: Tensor, rates: Sequence[float], generators: Sequence[torch.Generator | None]
) -> tuple[Tensor | None, list[float]]:
    """Draw the dropout masks of K adapters, each from a generator of its own.

    Args:
        x: [K, T, I].
        rates: the probability with which each adapter drops entries of its input, in [0, 1).
        generators: of each adapter; None: the default one.

    Returns:
        A uint8 mask of the shape of x, or None if nothing is dropped; and the mean of each mask.
    """
    if not any(rates):
        return None, [1.0] * len(rates)
    masks, means = [], []
    for x_TI, rate, generator in zip(x, rates, generators, strict=True):
        # draws nothing, so a generator goes on as in a pass of this adapter alone
        full = torch.ones(x_TI.shape, dtype=torch.uint8, device=x.device), 1.0
        mask, mean = keep_mask(x_TI, rate, generator) if rate > 0 else full
        masks.append(mask)
        means.append(mean)
    return torch.stack(masks), means


def grouped_low_rank_linear(
    x: Tensor,
    frozen: tuple[Tensor, Tensor | None],
    A: Tensor,
    B: Tensor,
    scales: Sequence[float],
    mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Return `x_k W^T + bias + s_k (m_k x_k A_k^T) B_k^T` of each adapter k, [K, T, O].

    `low_rank_linear` with a leading K: the same products in the same order of operations, so with
    one scale for all adapters each of them gets the numbers of a call of its own wherever the
    products of the libraries do not depend on the number of rows.

    Args:
        x: [K, T, I], in the dtype of the products.
        frozen: weight [O, I] and bias [O] or None; they get no gradient.
        A: [K, R, I].
        B: [K, O, R].
        scales: of the updates, divided by the mean of their mask.
        mask: of `grouped_masks`.
        gate: [K, T, E], factors of the R rows of A_k x_k^T, R / E consecutive rows each; None: 1.
    """
    # the caller has chosen the dtype; autocast would cast the factors again inside
    with torch.autocast(x.device.type, enabled=False):
        return _GroupedLowRankLinear.apply(x, A, B, gate, (*frozen, mask), _scale(scales, x))


def add_grouped_low_rank(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scales: Sequence[float],
    mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Return `y_k + s_k (m_k x_k A_k^T) B_k^T`, [K, T, O], for a base layer's output y [K, T, O].

    For base layers that are no frozen nn.Linear; see `grouped_low_rank_linear`.
    """
    h_KRT = _gated(torch.bmm(A.to(x.dtype), _masked(x, mask).mT), gate) * _scale(scales, x)
    return torch.baddbmm(y, h_KRT.mT.to(y.dtype), B.to(y.dtype).mT)


def _scale(scales: Sequence[float], x: Tensor) -> float | Tensor:
    """Return the scale of all adapters, or [K, 1, 1] if they differ."""
    # a number can be alpha of the product's kernel, as for one adapter: same rounding, no tensor
    if all(scale == scales[0] for scale in scales):
        return scales[0]
    return torch.tensor(scales, dtype=x.dtype, device=x.device).view(-1, 1, 1)


class _GroupedLowRankLinear(torch.autograd.Function):
    """See `_LowRankLinear`, whose products these are for each adapter."""

    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        frozen: tuple[Tensor, Tensor | None, Tensor | None],
        scale: float | Tensor,
    ) -> Tensor:
        weight, bias, mask = frozen
        K, T, I = x.shape
        bias = None if bias is None else bias.to(x.dtype)
        # of two dimensions, so no view of another
        y = F.linear(x.reshape(-1, I), weight.to(x.dtype), bias).view(K, T, -1)
        h_KRT = torch.bmm(A.to(x.dtype), _masked(x, mask).mT)
        gated_KRT = _gated(h_KRT, gate)
        if isinstance(scale, Tensor):
            y.baddbmm_((gated_KRT * scale).mT, B.to(x.dtype).mT)
        else:
            y.baddbmm_(gated_KRT.mT, B.to(x.dtype).mT, alpha=scale)
        ctx.save_for_backward(x, A, B, gate, weight, mask, h_KRT)
        ctx.scale = scale
        return y.detach()  # no view, as in `_LowRankLinear`

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        x, A, B, gate, weight, mask, h_KRT = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        grad = grad.contiguous()
        # recomputed: the mask takes a byte per value, less than the product
        dropped = _masked(x, mask)
        if torch.is_grad_enabled():  # double backward: the saved h has no graph
            h_KRT = torch.bmm(a, dropped.mT)
        u_KRT = _scaled_product(ctx.scale, b.mT, grad.mT)
        to_x = to_A = to_B = to_gate = None
        if gate is not None and ctx.needs_input_grad[3]:
            by_expert = (u_KRT * h_KRT).unflatten(1, (gate.shape[-1], -1))
            to_gate = by_expert.sum(2).mT.to(gate.dtype)
        # after the gradient of the gate, which needs u without it
        u_KRT = _gated(u_KRT, gate)
        if ctx.needs_input_grad[0]:
            # through the frozen layer; the updates' part is added in place
            to_x = (grad.view(-1, grad.shape[-1]) @ weight.to(x.dtype)).view(x.shape)
            if mask is None:
                to_x.baddbmm_(u_KRT.mT, a)
            else:
                to_x += torch.bmm(u_KRT.mT, a) * mask
        if ctx.needs_input_grad[1]:
            to_A = torch.bmm(u_KRT, dropped).to(A.dtype)
        if ctx.needs_input_grad[2]:
            to_B = _scaled_product(ctx.scale, _gated(h_KRT, gate), grad).mT.to(B.dtype)
        return to_x, to_A, to_B, to_gate, None, None


def _scaled_product(scale: float | Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `scale * left @ right` of each adapter, in one kernel if they share the scale."""
    if isinstance(scale, Tensor):
        return torch.bmm(left, right) * scale
    # with beta=0 the summand is not read
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _gated(h_KRT: Tensor, gate_KTE: Tensor | None) -> Tensor:
    if gate_KTE is None:
        return h_KRT
    gate_KE1T = gate_KTE.mT.to(h_KRT.dtype).unsqueeze(2)
    return (h_KRT.unflatten(1, (gate_KE1T.shape[1], -1)) * gate_KE1T).flatten(1, 2)
