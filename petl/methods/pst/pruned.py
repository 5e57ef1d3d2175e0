"""A linear layer whose weight moves by a low-rank product and is pruned by low-rank scores.

Shapes: I in, O out, R rank of the update, Q rank of the scores, T tokens. With the frozen weight W
and the factors U [O, R], V [R, I], A [O, Q], B [Q, I], R [O], C [I]:

    W' = W + beta U V,  S = |W'| + alpha1 A B + alpha2 (R 1^T + 1 C^T),  y = x (M W')^T + b

M keeps the largest scores. The gradient of S is taken to be that of M. With G = g^T x, that is
G W'; and because |W'| is in S, the gradient of W' is G M + G W' sign(W') = G (M + |W'|), entry by
entry. Backward computes W' again, so that nothing of the size of the weight is kept for it but M,
in bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from petl.ops import Ctx
from petl.ops.masks import mask_factors


class PruningFactors(NamedTuple):
    """The trained tensors, see the module."""

    U: Tensor
    V: Tensor
    A: Tensor
    B: Tensor
    R: Tensor
    C: Tensor


class Scales(NamedTuple):
    """Factors of the update and of both parts of the scores."""

    beta: float
    alpha1: float
    alpha2: float


Gradients = tuple[Tensor, ...]


def widened(factors: PruningFactors) -> PruningFactors:
    """Return the factors in float32, if a user has cast them to half precision."""
    # autograd casts their gradients back
    wide = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in factors)
    return PruningFactors(*wide)


def moved_weight(weight: Tensor, factors: PruningFactors, scales: Scales) -> Tensor:
    """Return W' [O, I] for a weight [O, I], in float32: a new tensor."""
    U, V = widened(factors)[:2]
    # autocast would round the scores, too, to half precision
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.to(U.dtype), U, V, alpha=scales.beta)


def pruning_scores(moved: Tensor, factors: PruningFactors, scales: Scales) -> Tensor:
    """Return the scores S [O, I] for W' [O, I]."""
    _, _, A, B, R, C = widened(factors)
    # one product instead of a product and two sums, each of which would read and write all of S
    left = torch.cat([scales.alpha1 * A, scales.alpha2 * R[:, None], torch.ones_like(A[:, :1])], 1)
    right = torch.cat([B, torch.ones_like(B[:1]), scales.alpha2 * C[None]])
    return moved.abs().addmm_(left, right)


def masked_(moved: Tensor, packed: Tensor | None) -> Tensor:
    """Set the pruned entries of `moved` to 0, in place; None: nothing is pruned."""
    return moved if packed is None else moved.mul_(mask_factors(packed, moved.shape, moved.dtype))


def gradients_of(
    gradient: Tensor,
    moved: Tensor,
    keep: Tensor | None,
    factors: PruningFactors,
    scales: Scales,
) -> Gradients:
    """Return the gradients of the factors.

    Args:
        gradient: G [O, I], of the masked weight.
        moved: W' [O, I], which is overwritten.
        keep: M [O, I], as numbers 0 and 1; None: all ones.
        factors: the factors.
        scales: of update and scores.
    """
    U, V, A, B, _, _ = widened(factors)
    to_moved = moved.abs().add_(1.0 if keep is None else keep).mul_(gradient)
    to_scores = moved.mul_(gradient)
    # the last column and row are sums over columns and rows
    left = torch.cat([scales.alpha1 * A, A.new_full((len(A), 1), scales.alpha2)], 1)
    right = torch.cat([scales.alpha1 * B, B.new_full((1, B.shape[1]), scales.alpha2)])
    to_left, to_right = to_scores @ right.t(), left.t() @ to_scores
    return (
        scales.beta * (to_moved @ V.t()),
        scales.beta * (U.t() @ to_moved),
        to_left[:, :-1],
        to_right[:-1],
        to_left[:, -1],
        to_right[-1],
    )


def backward_pass(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    factors: PruningFactors,
    scales: Scales,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Gradients | None]:
    """Return the gradients of the input and of the factors; each None if it is not needed.

    Args:
        grad: of the output, [..., O].
        x: the input, [..., I].
        weight: W [O, I].
        packed: the mask, or None if nothing is pruned.
        needs: whether gradients of the input and of the factors are needed.
    """
    g_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    moved = moved_weight(weight, factors, scales)
    keep = None if packed is None else mask_factors(packed, moved.shape, moved.dtype)
    to_x = to_factors = None
    if needs[0]:
        masked = moved if keep is None else moved * keep
        to_x = (g_TO @ masked.to(g_TO.dtype)).view(x.shape)
        del masked
    if needs[1]:
        gradient = (g_TO.t() @ x_TI).to(moved.dtype)
        to_factors = gradients_of(gradient, moved, keep, factors, scales)
    return to_x, to_factors


def pruned_linear(
    x: Tensor,
    frozen: tuple[Tensor, Tensor | None],
    masked: Tensor,
    packed: Tensor | None,
    factors: PruningFactors,
    scales: Scales,
) -> Tensor:
    """Return `x (M W')^T + b`, [..., O], with gradients of the input and of the factors.

    Args:
        x: [..., I].
        frozen: weight [O, I] and bias [O] or None; they get no gradient.
        masked: M W' [O, I] in the dtype of x, which is not kept.
        packed: the mask, or None if nothing is pruned.
        factors: the factors.
        scales: of update and scores.
    """
    # x has the dtype of the products already
    with torch.autocast(x.device.type, enabled=False):
        return _PrunedLinear.apply(x, (*frozen, masked, packed), scales, *factors)


class _PrunedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Ctx, x: Tensor, frozen: Any, scales: Scales, *factors: Tensor) -> Tensor:
        weight, bias, masked, packed = frozen
        ctx.save_for_backward(x, weight, packed, *factors)
        ctx.scales = scales
        y = F.linear(x, masked, None if bias is None else bias.to(x.dtype))
        return y.detach()  # no view, as in `_LowRankLinear`

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, packed, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
        to_x, to_factors = backward_pass(
            grad, x, weight, packed, PruningFactors(*factors), ctx.scales, needs
        )
        return to_x, None, None, *(to_factors or (None,) * 6)


def differentiable_weight(
    weight: Tensor, packed: Tensor | None, factors: PruningFactors, scales: Scales
) -> Tensor:
    """Return M W' [O, I] in the dtype of `weight`, with gradients of the factors.

    For layers that are called with it in place of their weight. A weight that trains gets the
    gradient of W'.
    """
    return _MaskedWeight.apply(weight, packed, scales, *factors)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Ctx, weight: Tensor, packed: Any, scales: Scales, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(weight, packed, *factors)
        ctx.scales = scales
        moved = moved_weight(weight, PruningFactors(*factors), scales)
        return masked_(moved, packed).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed, *tensors = ctx.saved_tensors
        factors = PruningFactors(*tensors)
        moved = moved_weight(weight, factors, ctx.scales)
        keep = None if packed is None else mask_factors(packed, moved.shape, moved.dtype)
        gradient = grad.to(moved.dtype)
        to_weight = None
        if ctx.needs_input_grad[0]:
            to_weight = moved.abs().add_(1.0 if keep is None else keep).mul_(gradient)
            to_weight = to_weight.to(weight.dtype)
        return to_weight, None, None, *gradients_of(gradient, moved, keep, factors, ctx.scales)
