"""Sets of positions, compared with the same rules on Python sets."""

import random

import pytest
import torch

from petl.ops import positions
from petl.ops.positions import largest_outer, random_positions, regrow


@pytest.mark.parametrize(("count", "size"), [(0, 10), (3, 10), (7, 10), (10, 10), (900, 1000)])
def test_random_positions_are_distinct_ascending_and_in_range(count, size):
    found = random_positions(count, size, torch.Generator().manual_seed(1)).tolist()
    assert len(set(found)) == count
    assert found == sorted(found)
    assert set(found) <= set(range(size))


@pytest.mark.parametrize("count", [2, 5])
def test_random_positions_are_uniform(count):
    generator = torch.Generator().manual_seed(0)
    draws = 6000
    hits = torch.zeros(6)
    for _ in range(draws):
        hits[random_positions(count, 6, generator)] += 1
    expected = draws * count / 6
    assert ((hits - expected).abs() < 5 * expected**0.5).all()


def exchanged(index, values, candidates, scores, count):
    """Drop and grow by the method's description, one position at a time."""
    held = dict(zip(index, values, strict=True))
    dropped = sorted(held, key=lambda at: abs(held[at]))[:count]
    remaining = set(held) - set(dropped)
    score = dict(zip(candidates, scores, strict=True))
    free = [at for at in candidates if at not in remaining]
    grown = sorted(free, key=lambda at: -abs(score[at]))[:count]
    cancelled = set(grown) & set(dropped)
    leaving = [at for at in dropped if at not in cancelled]
    coming = [at for at in grown if at not in cancelled]
    new = {at: ("old", index.index(at)) for at in held}
    for gone, come in zip(leaving, coming, strict=False):
        del new[gone]
        new[come] = ("new", candidates.index(come))
    return new


@pytest.mark.parametrize("seed", range(60))
def test_the_exchange_follows_the_set_algebra(seed):
    draw = random.Random(seed)
    size = draw.randint(8, 60)
    k = draw.randint(1, size)
    index = sorted(draw.sample(range(size), k))
    candidates = draw.sample(range(size), draw.randint(1, size))
    values = [draw.gauss(0, 1) for _ in index]
    scores = [draw.gauss(0, 1) for _ in candidates]
    count = draw.randint(0, k)
    expected = exchanged(index, values, candidates, scores, count)
    found, order, source = regrow(
        torch.tensor(index, dtype=torch.int32),
        torch.tensor(values),
        torch.tensor(candidates, dtype=torch.int32),
        torch.tensor(scores),
        count,
    )
    assert found.tolist() == sorted(expected)
    for at, old, come in zip(found.tolist(), order.tolist(), source.tolist(), strict=True):
        assert expected[at] == (("new", come) if come >= 0 else ("old", old))


@pytest.mark.parametrize("limit", [50, 2**20])
@pytest.mark.parametrize(("taken", "count"), [(0, 30), (40, 30), (590, 30), (10, 1)])
def test_the_best_of_an_outer_product_are_found_without_forming_it(
    monkeypatch, limit, taken, count
):
    monkeypatch.setattr(positions, "PAIRS", limit)
    row, column = torch.rand(20), torch.rand(30)
    held = torch.randperm(600)[:taken].sort().values.int()
    scores = torch.outer(row, column).view(-1)
    scores[held.long()] = -1
    count = min(count, 600 - taken)
    expected = scores.topk(count)
    where, best = largest_outer(row, column, held, 30 if taken == 590 else count)
    torch.testing.assert_close(best, expected.values)
    assert set(where.tolist()) == set(expected.indices.tolist())


def test_few_pairs_of_an_outer_product_are_computed():
    """Of 60,000 products some K ln K are enough for the best K = 800."""
    pairs = sum(len(a) for a, _ in positions._rank_pairs(200, 300, 800))
    assert 800 <= pairs < 6000


def test_rows_that_never_had_a_gradient_grow_last():
    row, column = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([1.0, 3.0])
    where, best = largest_outer(row, column, torch.tensor([3], dtype=torch.int32), 2)
    assert where[0] == 2
    assert best.tolist() == [2.0, 0.0]
