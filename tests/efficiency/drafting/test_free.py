"""Lookup and recycling together."""

import torch
from draft_fixtures import VOCABULARY

from petl import testing
from petl.efficiency.drafting import Costs, Draft, PassOutput, Root, drafter
from petl.efficiency.drafting.free import merge
from petl.efficiency.drafting.registry import untrained


def tree(tokens, parents, chances):
    return Draft(torch.tensor(tokens).long(), torch.tensor(parents).long(), torch.tensor(chances))


def paths(draft):
    """The texts of all nodes, in order."""
    found = [()]
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        found.append((*found[parent], token))
    return found[1:]


def test_drafters_that_need_no_training_are_made_by_their_names():
    models = {"aggressive": testing.tiny_t5()}
    for name in untrained():
        assert drafter(name, model=models.get(name, testing.tiny_llama())).name == name
    assert "recycling" in untrained()


def test_equal_beginnings_are_merged_and_the_chain_comes_first():
    chain = tree([5, 6], [0, 1], [0.5, 0.8])
    other = tree([7, 5, 6, 8, 9], [0, 0, 2, 2, 1], [0.1, 0.4, 0.5, 0.25, 0.9])
    merged, chances = merge(chain, other)
    assert paths(merged) == [(5,), (5, 6), (7,), (7, 9), (5, 8)]
    # a sibling of a guess of the chain is right only if that one is wrong
    expected = [0.5, 0.5 * 0.8, 0.5 * 0.1, 0.5 * 0.1 * 0.9, 0.5 * (1 - 0.8) * 0.25]
    assert torch.allclose(torch.tensor(chances), torch.tensor(expected))
    assert paths(merge(tree([], [], []), other)[0])[0] == (5,)


def test_the_budget_goes_to_the_chain_first():
    model = testing.tiny_llama()
    free = drafter("free", model=model, length=3, nodes=7)
    text = [5, 6, 7, 8, 5, 6]
    free.start(text, None)
    free.recycling.table[6] = torch.arange(20, 28)
    assert paths(free.draft(Root(text), 2)) == [(7,), (7, 8)]
    found = paths(free.draft(Root(text), 5))
    assert found[:3] == [(7,), (7, 8), (7, 8, 5)]
    assert len(found) == 5
    # without an earlier occurrence only the table drafts
    assert paths(free.draft(Root([1, 6]), 3))[0] == (20,)


def test_a_draft_that_is_never_right_is_not_made_where_passes_over_more_tokens_cost_more():
    free = drafter("free", model=testing.tiny_llama())
    free.costs = Costs({1: 1.0, 2: 1.6})
    text = [VOCABULARY - 1 - i for i in range(40)]
    logits = torch.arange(VOCABULARY, 0, -1).float()[None]  # the most likely are 0, 1, 2, ...
    counts = []
    for end in range(2, 40):  # no token is ever in its row
        free.recycling.table[text[end - 1]] = torch.arange(8)
        counts.append(len(free.draft(Root(text[:end]), None).tokens))
        free.observe(
            PassOutput(torch.tensor([text[end - 1]]), torch.tensor([]).long(), logits, None, [0])
        )
    assert counts[-1] == 0
