"""Merging of similar tokens (ToMe; Bolya et al., ICLR 2023, arXiv:2210.09461).

Shapes: N rows, T tokens, C width, D width of a head, R tokens to remove. Tokens at even positions
are set A, those at odd positions set B. The R tokens of A that are most similar to some token of B,
the sources, are added to it, their partner; the others stay.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Matching(NamedTuple):
    """Which tokens stay and which are merged; indices are positions among the T tokens.

    Attributes:
        kept: [N, T - R], in their new order: A, then B; with two protected tokens, these first.
        sources: [N, R], the most similar first.
        partners: [N, R].
        places: [N, R], the position of each partner among the kept tokens.
    """

    kept: Tensor
    sources: Tensor
    partners: Tensor
    places: Tensor


@torch.no_grad()
def match(keys: Tensor, r: int, protected: int) -> Matching:
    """Return which R = `r` of T tokens are merged into which others, by their keys [N, T, D].

    Computed in float32, with a stable sort: of equally similar tokens the first are merged.

    Args:
        r: at most (T - protected) // 2.
        protected: number of tokens at the start that are not merged, 1 or 2.
    """
    with torch.autocast(keys.device.type, enabled=False):
        k = F.normalize(keys.float(), dim=-1)
        score = k[:, ::2] @ k[:, 1::2].mT  # [N, tokens of A, tokens of B]
    score[:, 0] = -torch.inf
    if protected == 2:
        score[:, :, 0] = -torch.inf
    best, partner = score.max(-1)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    chosen, staying = ranked[:, :r], ranked[:, r:].sort(-1).values
    odd = torch.arange(1, keys.shape[1], 2, device=keys.device).expand(len(keys), -1)
    # token 0 is the first of those that stay
    parts = [2 * staying, odd] if protected == 1 else [
        2 * staying[:, :1], odd[:, :1], 2 * staying[:, 1:], odd[:, 1:]
    ]  # fmt: skip
    to = partner.gather(1, chosen)
    # in both orders B's token j comes after all of A that stay and j tokens of B
    return Matching(torch.cat(parts, 1), 2 * chosen, 2 * to + 1, staying.shape[1] + to)


def merge(
    x: Tensor,
    sizes: Tensor | None,
    matching: Matching,
    correct: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the tokens that stay, [N, T - R, C], as means of all that were merged into them.

    Computed in float32 at least; the tokens keep their dtype.

    Args:
        x: [N, T, C].
        sizes: of how many tokens each is the mean, [N, T], float32; None: one each.
        matching: which tokens are merged.
        correct: called with the sources S and their partners, [N, R, C] each and both multiplied by
            their sizes; returns what is added to the partners, S by default.

    Returns:
        The tokens and their sizes, [N, T - R].
    """
    kept, sources, partners, places = matching
    with torch.autocast(x.device.type, enabled=False):
        v = x.to(torch.promote_types(x.dtype, torch.float32))
        if sizes is None:
            sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        else:
            v = v * sizes[..., None]
        S = rows(v, sources)
        if correct is not None:
            S = correct(S, rows(v, partners))
        sizes = sizes.gather(1, kept).scatter_add(1, places, sizes.gather(1, sources))
        total = rows(v, kept)
        total = total.flatten(0, 1).index_add_(0, _flat(places, total.shape[1]), S.flatten(0, 1))
        return (total.view(len(x), -1, x.shape[-1]) / sizes[..., None]).to(x.dtype), sizes


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens [N, K, C] at `index` [N, K] of x [N, T, C]."""
    # whole rows of a matrix: faster than `gather` with an index for each number
    flat = x.flatten(0, 1).index_select(0, _flat(index, x.shape[1]))
    return flat.view(*index.shape, x.shape[-1])


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Return an index [N, K] of tokens as one of all tokens of all rows, [N K]."""
    first = torch.arange(len(index), device=index.device) * tokens
    return (index + first[:, None]).flatten()
