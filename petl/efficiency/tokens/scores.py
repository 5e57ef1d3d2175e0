"""Scores of blocks of tokens, and the tokens of those that are kept.

Shapes: B rows, T tokens, b tokens of a block, N blocks of a row (the last one may have fewer
tokens), K blocks that are kept, P tokens of these, H width of the hidden states, h heads.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Choice(NamedTuple):
    """How many blocks of each row are kept.

    Attributes:
        block: b.
        keep: share of the blocks, rounded up.
        first, last: blocks at the ends of the tokens of a row that are always kept.
    """

    block: int
    keep: float
    first: int
    last: int

    def count(self, tokens: int) -> int:
        """Return K for rows of T tokens; N: all."""
        blocks = math.ceil(tokens / self.block)
        # a last block that is not full is kept in all rows, so that they keep equally many tokens
        ends = self.first + self.last + (tokens % self.block > 0)
        return min(blocks, max(1, math.ceil(self.keep * blocks), ends))

    def positions(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the positions [B, P] of the tokens of the best blocks, ascending.

        Args:
            scores: of blocks, [B, N].
            valid: False for padding, [B, T].
        """
        tokens, device = valid.shape[1], valid.device
        there = in_blocks(valid[..., None], self.block).any(2)[..., 0]
        # ranks of the blocks that have tokens, from both ends
        from_start, from_end = there.cumsum(1), there.flip(1).cumsum(1).flip(1)
        always = there & ((from_start <= self.first) | (from_end <= self.last))
        if tokens % self.block:
            always[:, -1] = True
        ranked = scores.float().masked_fill(~there, -torch.inf).masked_fill(always, torch.inf)
        chosen = ranked.topk(self.count(tokens), dim=1).indices.sort(1).values
        found = chosen[..., None] * self.block + torch.arange(self.block, device=device)
        missing = -tokens % self.block  # of the last block, which each row keeps
        return found.flatten(1)[:, : found[0].numel() - missing]


def in_blocks(x: Tensor, block: int) -> Tensor:
    """Return x [B, T, ...] as [B, N, b, ...], the last block with zeros behind its tokens."""
    missing = -x.shape[1] % block
    padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return padded.unflatten(1, (-1, block))


def norm_scores(hidden: Tensor, valid: Tensor, block: int) -> Tensor:
    """Return the mean norm of the hidden states [B, T, H] of the tokens of each block, [B, N]."""
    norms = in_blocks((hidden.float().norm(dim=-1) * valid)[..., None], block).sum(2)[..., 0]
    counts = in_blocks(valid[..., None], block).sum(2)[..., 0]
    return norms / counts.clamp(min=1)


def pooled_map(queries: Tensor, keys: Tensor, valid: Tensor, block: int, scale: float) -> Tensor:
    """Return the means over b x b tokens of the positive products of queries and keys, [B, N, N].

    Summed over heads. Products with later keys and with padding count as 0.

    Args:
        queries: [B, h, T, D].
        keys: [B, h or fewer, T, D].
        valid: False for padding, [B, T].
        scale: factor of the products.
    """
    B, h, T, _ = queries.shape
    later = torch.ones(T, T, dtype=torch.bool, device=queries.device).triu(1)
    left_out = later | ~valid[:, None, :] | ~valid[:, :, None]
    total = queries.new_zeros(B, T, T, dtype=torch.float32)
    group = h // keys.shape[1]
    # a head at a time: T x T numbers of each exist anyway where they are looked at
    for head in range(h):
        products = queries[:, head].float() @ keys[:, head // group].float().mT
        total += products.mul_(scale).clamp_(min=0)
    total.masked_fill_(left_out, 0)
    rows = in_blocks(total, block).mean(2)  # [B, N, T]
    return in_blocks(rows.mT, block).mean(2).mT


def column_sums(pooled: Tensor) -> Tensor:
    """Return what the queries of all blocks find in the keys of each: [B, N] of [B, N, N]."""
    return pooled.sum(1)
