"""Masks, compaction and plans of draft trees."""

import itertools

import pytest
import torch
from draft_fixtures import DECODERS, VOCABULARY, prompt

from petl import testing
from petl.efficiency.drafting import Costs, best, plan, tau
from petl.efficiency.drafting.passes import DraftPasses
from petl.efficiency.drafting.tree import (
    ancestors,
    children,
    depths,
    first_chain,
    fitted,
    is_chain,
    selected,
)

PARENTS = [0, 0, 1, 3, 3, 2, 6]
TOKENS = [5, 6, 7, 8, 9, 10, 11]


def path_to(node, parents=PARENTS):
    path = []
    while node:
        path.insert(0, node)
        node = parents[node - 1]
    return path


def test_the_shape_of_a_tree():
    assert depths(PARENTS) == [0, 1, 1, 2, 3, 3, 2, 3]
    assert [row.nonzero().flatten().tolist() for row in ancestors(PARENTS)] == [
        sorted([0, *path_to(node)]) for node in range(8)
    ]
    assert first_chain(PARENTS) == [1, 3, 4]
    assert is_chain([0, 1, 2])
    assert not is_chain(PARENTS)
    assert selected(TOKENS, PARENTS, [2, 6, 7]) == ([6, 10, 11], [0, 1, 2])
    # of equal siblings the first counts
    assert children([5, 5, 6], [0, 0, 2]) == [{5: 1}, {}, {6: 3}, {}]


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("count", [8, 11])
def test_a_tree_pass_equals_its_paths_alone_and_leaves_a_fresh_cache(family, padding, count):
    model, ids = DECODERS[family](), prompt(1)
    ids[:, :padding] = 0
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(
        ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True
    ).cache
    kwargs = {"cache": cache, "use_cache": True, "position_ids": positions}
    passes = DraftPasses(model, ids, kwargs | ({"attention_mask": mask} if padding else {}))
    logits = passes.run(ids[0].tolist(), TOKENS, PARENTS, count)
    assert logits.shape == (8, VOCABULARY)
    for node in range(8):
        text = [*ids[0, padding:].tolist(), *(TOKENS[i - 1] for i in path_to(node))]
        alone = model(torch.tensor([text])).logits[0, -1]
        assert torch.allclose(logits[node], alone, atol=1e-5)
    path = [0, 2, 6, 7]
    passes.keep(path, count)
    kept = [*ids[0, padding:].tolist(), *(TOKENS[i - 1] for i in path[1:])]
    fresh = model(torch.tensor([kept]), use_cache=True).cache
    for ours, theirs in zip(passes.cache.layers, fresh.layers, strict=True):
        assert torch.allclose(ours.keys[:, :, padding:], theirs.keys, atol=1e-5)
        assert torch.allclose(ours.values[:, :, padding:], theirs.values, atol=1e-5)


# Plans


def test_a_pass_has_room_up_to_the_last_entry_of_a_table_of_positions():
    room = {}
    for name, model in {"table": testing.tiny_gpt2(), "rotary": DECODERS["qwen"]()}.items():
        ids = prompt(1, testing.tiny_gpt2().config.n_positions - 5)
        passes = DraftPasses(model, ids, {"cache": model(ids, use_cache=True).cache})
        room[name] = [count for count in (5, 6) if passes.has_room(count)]
    assert room == {"table": [5], "rotary": [5, 6]}


def trees(paths, nodes):
    """All sets of paths of this size that are closed under prefixes."""
    for chosen in itertools.combinations(paths, nodes):
        if all(path[:-1] in chosen for path in chosen if len(path) > 1):
            yield chosen


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_is_the_best_of_all_trees(seed):
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.rand(3, 2, generator=generator).div(2).tolist()
    paths = [p for depth in (1, 2, 3) for p in itertools.product(range(2), repeat=depth)]
    highest = max(tau(frequencies, tree) for tree in trees(paths, 6))
    found = plan(frequencies, 6)
    assert len(found) == 6
    assert tau(frequencies, found) == pytest.approx(highest)


def test_tau_is_the_mean_of_simulated_passes():
    frequencies = [[0.5, 0.2, 0.1], [0.4, 0.3, 0.1], [0.6, 0.1, 0.1]]
    paths = plan(frequencies, 7)
    generator, rounds, total = torch.Generator().manual_seed(0), 200_000, 0
    ranks = []
    for row in frequencies:
        last = torch.tensor([*row, 1 - sum(row)])
        ranks.append(torch.multinomial(last, rounds, replacement=True, generator=generator))
    true = torch.stack(ranks, 1)
    inside = torch.ones(rounds, dtype=torch.bool)
    for depth in range(1, 4):
        codes = {sum(r * 4**i for i, r in enumerate(p)) for p in paths if len(p) == depth}
        code = sum(true[:, i] * 4**i for i in range(depth))
        inside = inside & torch.isin(code, torch.tensor(sorted(codes), dtype=torch.long))
        total += int(inside.sum())
    assert tau(frequencies, paths) == pytest.approx(1 + total / rounds, rel=0.01)


def test_the_likeliest_paths_of_a_table_that_is_the_same_at_each_depth():
    row = [0.4, 0.1, 0.05]
    assert plan([row] * 3, 3) == [(0,), (0, 0), (1,)]
    assert plan([[1.0]], 5) == [(0,)]
    assert plan([[0.0, 0.3]], 5) == [(1,)]


def test_the_best_tree_has_the_most_tokens_per_second():
    frequencies = [[0.6, 0.2], [0.5, 0.1], [0.4, 0.1]]
    costs = Costs({1: 1.0, 2: 1.5, 4: 1.6, 8: 3.0})
    found = best(frequencies, costs)
    rates = {n: tau(frequencies, plan(frequencies, n)) / costs.ratio(n + 1) for n in range(1, 12)}
    assert len(found) == max(rates, key=lambda n: rates[n]) == 3
    assert found == plan(frequencies, 3)
    # where a pass over two tokens costs two, drafts do not pay
    assert best([[0.3]], Costs({1: 1.0, 2: 2.0})) == []
    # drafting costs, too
    assert best([[0.3]], Costs({1: 1.0, 2: 1.2})) == [(0,)]
    assert best([[0.3]], Costs({1: 1.0, 2: 1.2}), drafting=0.2) == []
    assert len(best([[0.9]] * 9, Costs({1: 1.0, 64: 1.0}), most=4)) == 4


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_are_as_deep_as_they_may_be(depth):
    tree = (torch.tensor(TOKENS), torch.tensor(PARENTS))
    tokens, parents = fitted(tree, VOCABULARY, budget=None, depth=depth, chains_only=False)
    kept = [i for i, d in enumerate(depths(PARENTS)[-len(TOKENS) :]) if d <= depth]
    assert tokens == [TOKENS[i] for i in kept]
    assert max(depths(parents)) == depth
