"""Top-k routing of tokens to experts. Shapes: T tokens, E experts, K picked."""

from typing import Any

import torch
from torch import Tensor


class _FloatLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x.float() @ W.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # ty: ignore[incompatible-method-override]
        x, W = ctx.saved_tensors
        to_x = (grad @ W).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_W = grad.t() @ x.float() if ctx.needs_input_grad[1] else None
        return to_x, to_W


def float_linear(x: Tensor, W: Tensor) -> Tensor:
    """`x W^T` in float32, [T, E], for x [T, I] of any precision and W [E, I] in float32.

    For backward it keeps `x` as it is, which others keep as well, not a copy in float32.
    """
    return _FloatLinear.apply(x, W)


def top_k_gates(logit_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, picks and probabilities of a softmax router.

    Args:
        logit_TE: router logits, fp32 [T, E].
        k: experts per token.

    Returns:
        gate [T, E]: softmax over the k largest logits, zero elsewhere; picked [T, E]: 1 where an
        expert was chosen; prob [T, E]: softmax over all experts.
    """
    index_TK = logit_TE.detach().topk(k, dim=-1).indices
    picked_TE = torch.zeros_like(logit_TE).scatter_(-1, index_TK, 1.0)
    gate_TE = logit_TE.masked_fill(picked_TE == 0, -torch.inf).softmax(-1)
    return gate_TE, picked_TE, logit_TE.softmax(-1)


def balance_loss(
    picked_TE: Tensor, prob_TE: Tensor, mask_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`E * sum_e f_e P_e` (Switch Transformer, arXiv:2101.03961) and the load f [E].

    f_e is the share of all picks that went to expert e (they sum to 1), P_e its mean probability;
    only P carries a gradient. The value is 1 for a uniform router and up to E for a collapsed one.
    Tokens whose mask is 0 are left out.
    """
    if mask_T is None:
        load_E, mean_E = picked_TE.mean(0), prob_TE.mean(0)
    else:
        weight_T = mask_T.to(prob_TE.dtype)
        weight_T = weight_T / weight_T.sum().clamp(min=1.0)
        # not a matrix product: autocast would do that one in half precision
        load_E, mean_E = ((weight_T[:, None] * t).sum(0) for t in (picked_TE, prob_TE))
    load_E = load_E / load_E.sum().clamp(min=torch.finfo(load_E.dtype).tiny)
    return load_E.numel() * (load_E.detach() * mean_E).sum(), load_E.detach()
