"""Sets of positions in a matrix: random ones, the best ones, and the exchange of some for others.

Positions are flat (`row * Q + column` in a matrix [P, Q]) and distinct. K of them are held.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PAIRS = 2**20  # of ranks, looked at in one go


def random_positions(count: int, size: int, generator: torch.Generator) -> Tensor:
    """A uniform random set of `count` of `size` positions, ascending, int64, on the CPU."""
    if count > size // 2:  # easier to say which are not in it
        absent = torch.ones(size, dtype=torch.bool)
        absent[random_positions(size - count, size, generator)] = False
        return absent.nonzero().view(-1)
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        drawn = torch.randint(size, (count + count // 8 + 8,), generator=generator)
        found = torch.cat([found, drawn]).unique()
    surplus = torch.randperm(len(found), generator=generator)
    return found[surplus[:count]].sort().values


def regrow(
    index: Tensor, values: Tensor, candidates: Tensor, scores: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace up to `count` positions of small `|values|` by candidates of large `|scores|`.

    Dropped are the `count` positions of smallest `|values|`, grown the `count` best candidates not
    among those that remain. What is in both stays as it is; the other grown positions replace the
    other dropped ones, those of smallest `|values|` first.

    Args:
        index: positions [K]; values [K].
        candidates: positions [C], distinct, in any order; scores [C].

    Returns:
        the new positions [K], ascending; the old slot of each, [K]; for each the candidate that it
        grew from, [K], or -1 for a position that was there before.
    """
    dropped = values.abs().argsort(stable=True)[:count]
    remains = torch.ones_like(index, dtype=torch.bool).index_fill_(0, dropped, False)
    ranked = scores.abs().argsort(stable=True, descending=True)
    ranked = ranked[~torch.isin(candidates[ranked], index[remains])][:count]
    grown = ranked[~torch.isin(candidates[ranked], index[dropped])]
    freed = dropped[~torch.isin(index[dropped], candidates[ranked])][: len(grown)]
    new = index.index_copy(0, freed, candidates[grown])
    source = torch.full_like(index, -1, dtype=torch.int64).index_copy_(0, freed, grown)
    new, order = new.sort()
    return new, order, source[order]


def largest_outer(row: Tensor, column: Tensor, taken: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best positions of the outer product of two vectors, and their values.

    Positions in `taken` [K] are passed over. The product [P, Q] is never formed: among its n best
    entries, ranks a and b of row and column satisfy (a + 1) (b + 1) <= n, some n log n pairs.

    Args:
        row: [P], not negative.
        column: [Q], not negative.
    """
    P, Q = len(row), len(column)
    row, row_at = row.sort(descending=True, stable=True)
    column, column_at = column.sort(descending=True, stable=True)
    count = min(count, P * Q - len(taken))
    best, where = row.new_empty(0), taken.new_empty(0)
    for a, b in _rank_pairs(P, Q, count + len(taken)):
        a, b = a.to(row.device), b.to(row.device)
        at = (row_at[a] * Q + column_at[b]).to(taken.dtype)
        free = ~torch.isin(at, taken)
        best, where = torch.cat([best, (row[a] * column[b])[free]]), torch.cat([where, at[free]])
        best, order = best.sort(descending=True, stable=True)
        best, where = best[:count], where[order[:count]]
    return where, best


def _rank_pairs(P: int, Q: int, reach: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All (a, b) with (a + 1) (b + 1) <= reach, a below P, b below Q, about `PAIRS` at a time."""
    width = (reach // torch.arange(1, P + 1)).clamp(max=Q)  # how many b each a goes with
    width = width[width > 0]
    turn = (width.cumsum(0) - 1) // PAIRS  # in which turn each a comes
    for i in range(int(turn[-1]) + 1 if len(turn) else 0):
        a = (turn == i).nonzero().view(-1)
        before = width[a].cumsum(0) - width[a]
        a, before = (t.repeat_interleave(width[a]) for t in (a, before))
        yield a, torch.arange(len(a)) - before
