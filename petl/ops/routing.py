"""Top-k routing of tokens to experts. Shapes: T tokens, E experts, K picked.

The balance loss is `E * sum_e f_e P_e` (Switch Transformer, arXiv:2101.03961): f_e is the share of
all picks that went to expert e (they sum to 1), P_e its mean probability; only P carries a
gradient. It is 1 for a uniform router and up to E for a collapsed one. With counts of any number of
batches it is linear in the sums of the probabilities: `balance_weights(counts) @ prob_E`.
"""

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
    prob_TE = logit_TE.softmax(-1)
    prob_TK, index_TK = prob_TE.topk(k, dim=-1)
    gate_TK = prob_TK / prob_TK.sum(-1, keepdim=True)
    zeros = torch.zeros_like(prob_TE)
    return zeros.scatter(-1, index_TK, gate_TK), zeros.scatter(-1, index_TK, 1.0), prob_TE


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
