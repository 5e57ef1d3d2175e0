"""Sets of positions in a matrix: draw random ones, find the best ones, exchange some for others.

Positions are flat (`row * Q + column` in a matrix [P, Q]) and distinct; a set has K of them.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

PAIRS = 2**20  # pairs of ranks per batch in `largest_outer`


def generator_of(seed: int, key: str) -> torch.Generator:
    """Return a generator on the CPU, equal in all processes, for each module of its own.

    Args:
        seed: of all modules.
        key: path of the module; others do not change its numbers.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_positions(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw a uniform random set of `count` of `size` positions: ascending, int64, on the CPU."""
    if count > size // 2:  # rejection would be slow: draw the complement
        absent = torch.ones(size, dtype=torch.bool)
        absent[random_positions(size - count, size, generator)] = False
        return absent.nonzero().view(-1)
    positions = torch.empty(0, dtype=torch.int64)
    while len(positions) < count:
        drawn = torch.randint(size, (count + count // 8 + 8,), generator=generator)
        positions = torch.cat([positions, drawn]).unique()
    # `unique` sorts, so a prefix would not be uniform
    order = torch.randperm(len(positions), generator=generator)
    return positions[order[:count]].sort().values


def regrow(
    index: Tensor, values: Tensor, candidates: Tensor, scores: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace up to `count` positions of small `|values|` by candidates of large `|scores|`.

    The `count` positions of smallest `|values|` are dropped, and the `count` best candidates that
    are not among the remaining ones are grown. Positions that are both dropped and grown are
    unchanged; the other grown positions replace the other dropped ones, those of smallest
    `|values|` first.

    Args:
        index: positions, [K].
        values: their values, [K].
        candidates: positions, [C], distinct, in any order.
        scores: their scores, [C].
        count: maximum number of positions to replace.

    Returns:
        The new positions [K], ascending; the old slot of each [K]; the candidate of each grown
        position [K], and -1 for positions that were in the set before.
    """
    # stable, so that all processes drop the same of equal values
    dropped = values.abs().argsort(stable=True)[:count]
    remains = torch.ones_like(index, dtype=torch.bool).index_fill_(0, dropped, False)
    ranked = scores.abs().argsort(stable=True, descending=True)
    # candidates that the set keeps anyway cannot grow
    ranked = ranked[~torch.isin(candidates[ranked], index[remains])][:count]
    grown = ranked[~torch.isin(candidates[ranked], index[dropped])]
    freed = dropped[~torch.isin(index[dropped], candidates[ranked])][: len(grown)]
    new = index.index_copy(0, freed, candidates[grown])
    source = torch.full_like(index, -1, dtype=torch.int64).index_copy_(0, freed, grown)
    new, order = new.sort()
    return new, order, source[order]


def largest_outer(row: Tensor, column: Tensor, taken: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest positions of the outer product of two vectors, and their values.

    The product [P, Q] is not formed: for its n largest entries, the ranks a and b of row and column
    satisfy (a + 1) (b + 1) <= n, which leaves about n log n pairs.

    Args:
        row: [P], not negative.
        column: [Q], not negative.
        taken: positions to skip, [K].
        count: number of positions.
    """
    P, Q = len(row), len(column)
    row, row_at = row.sort(descending=True, stable=True)
    column, column_at = column.sort(descending=True, stable=True)
    # there may be fewer free positions
    count = min(count, P * Q - len(taken))
    best, where = row.new_empty(0), taken.new_empty(0)
    # taken positions may be among the best, so look that much further
    for a, b in _rank_pairs(P, Q, count + len(taken)):
        a, b = a.to(row.device), b.to(row.device)
        at = (row_at[a] * Q + column_at[b]).to(taken.dtype)
        free = ~torch.isin(at, taken)
        best, where = torch.cat([best, (row[a] * column[b])[free]]), torch.cat([where, at[free]])
        best, order = best.sort(descending=True, stable=True)
        best, where = best[:count], where[order[:count]]
    return where, best


def _rank_pairs(P: int, Q: int, reach: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all (a, b) with (a + 1) (b + 1) <= reach, a < P, b < Q, about `PAIRS` at a time."""
    width = (reach // torch.arange(1, P + 1)).clamp(max=Q)  # number of b for each a
    width = width[width > 0]
    batch = (width.cumsum(0) - 1) // PAIRS  # the batch of each a
    for i in range(int(batch[-1]) + 1 if len(batch) else 0):
        a = (batch == i).nonzero().view(-1)
        before = width[a].cumsum(0) - width[a]
        a, before = (t.repeat_interleave(width[a]) for t in (a, before))
        yield a, torch.arange(len(a)) - before
