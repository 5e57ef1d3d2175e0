"""Top-k routing of tokens to experts. Shapes: T tokens, E experts, K picked.

The balance loss is `E * sum_e f_e P_e` (Switch Transformer, arXiv:2101.03961): f_e is the share of
all picks that went to expert e (they sum to 1), P_e its mean probability; only P carries a
gradient. It is 1 for a uniform router and up to E for a collapsed one. With counts of any number of
batches it is linear in the sums of the probabilities: `balance_weights(counts) @ prob_E`.
"""

from typing import Any

import torch
from torch import Tensor


class _FloatLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return (W @ x.float().t()).t()  # experts as rows: what follows is up to ten times faster

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # ty: ignore[incompatible-method-override]
        x, W = ctx.saved_tensors
        to_x = (grad @ W).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_W = grad.t() @ x.float() if ctx.needs_input_grad[1] else None
        return to_x, to_W


def float_linear(x: Tensor, W: Tensor) -> Tensor:
    """`x W^T` in float32, [T, E], for x [T, I] of any precision and W [E, I] in float32.

    For backward it keeps `x` as it is, which others keep as well, not a copy in float32. In memory
    the result lies as [E, T].
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
    logit_ET = logit_TE.t()  # a softmax over few columns is slow
    index_KT = logit_ET.detach().topk(k, dim=0).indices
    picked_ET = torch.zeros_like(logit_ET).scatter_(0, index_KT, 1.0)
    gate_ET = logit_ET.masked_fill(picked_ET == 0, -torch.inf).softmax(0)
    return gate_ET.t(), picked_ET.t(), logit_ET.softmax(0).t()


def expert_sums(picked_TE: Tensor, prob_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the balance loss is made of, summed over the tokens whose mask is not 0.

    Returns:
        counts [E + 1]: the picks of each expert and the number of tokens, without a gradient;
        prob [E]: the sum of each expert's probabilities.
    """
    if mask_T is None:
        picks_E, prob_E = picked_TE.sum(0), prob_TE.sum(0)
        tokens = picks_E.new_full((1,), len(prob_TE))
    else:
        weight_T1 = mask_T.to(prob_TE.dtype)[:, None]
        # not a matrix product: autocast would do that one in half precision
        picks_E, prob_E = ((weight_T1 * t).sum(0) for t in (picked_TE, prob_TE))
        tokens = weight_T1.sum(0)
    return torch.cat([picks_E, tokens]).detach(), prob_E


def balance_weights(counts: Tensor) -> Tensor:
    """The balance loss by the sum of each expert's probabilities, [E], of counts [E + 1].

    They are E times the expert's share of the picks over the number of tokens.
    """
    tokens = counts[-1].clamp(min=1.0)
    return load(counts) * (len(counts) - 1) / tokens


def load(counts: Tensor) -> Tensor:
    """Each expert's share of the picks, [E], of counts [E + 1]."""
    picks_E = counts[:-1]
    return picks_E / picks_E.sum().clamp(min=torch.finfo(picks_E.dtype).tiny)
