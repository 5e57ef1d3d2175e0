"""Top-k routing of tokens to experts. Shapes: T tokens, E experts, K picked."""

import torch
from torch import Tensor


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
