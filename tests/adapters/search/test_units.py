"""Levels put into a model: only what differs is written, and the originals come back."""

import pytest
import torch

import petl
from petl import testing
from petl.adapters import search
from petl.errors import UnsupportedError
from petl.testing.models import tiny_gpt2, tiny_llama, tiny_t5


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = petl.wrap(tiny_llama(2), "lora", r=3, target_modules=["q_proj", "v_proj"])
    return testing.stir(model).eval()


IDS = torch.arange(3, 15).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt])
def test_the_original_tensors_come_back_bit_for_bit(model, failure):
    units, before, outputs = search.levels_of(model, "rank"), bits(model), logits(model)

    def use():
        with search.swapped(model, units) as to:
            to([0] * len(units))
            assert not torch.allclose(logits(model), outputs)
            to([0, 2, 1, 0])
            if failure:
                raise failure

    if failure:
        with pytest.raises(failure):
            use()
    else:
        use()
    assert_same(before, bits(model))
    assert torch.equal(logits(model), outputs)


def test_a_level_is_in_the_model_and_units_at_the_same_level_are_not_written_again(model):
    units = search.levels_of(model, "rank")
    live = dict(model.named_parameters())
    with search.swapped(model, units) as to:
        for state in ((0, 1, 2, 0), (0, 1, 0, 2)):
            versions = [live[name]._version for unit in units for name in unit.tensors[0]]
            to(state)
            for unit, level in zip(units, state, strict=True):
                for name, tensor in unit.tensors[level].items():
                    assert torch.equal(live[name], tensor)
        after = [live[name]._version for unit in units for name in unit.tensors[0]]
    # two tensors to a unit; the first two units kept their level
    assert [new - old for old, new in zip(versions, after, strict=True)] == [0] * 4 + [1] * 4


def test_a_state_that_does_not_fit_is_refused(model):
    units = search.levels_of(model, "rank")
    with search.swapped(model, units) as to:
        for state, words in (([0, 0, 0], "3 levels .* 4"), ([0, 3, 0, 0], "level 3 of unit 1")):
            with pytest.raises(petl.InputError, match=words):
                to(state)
    other = petl.wrap(tiny_llama(2), "lora", r=2, target_modules=["q_proj", "v_proj"])
    with (
        pytest.raises(petl.InputError),
        search.swapped(other, units),
    ):
        pass


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_skipped_block_returns_its_input(build):
    base = build(3)
    model = base.eval()
    units = search.levels_of(model, "skip")
    assert [unit.costs for unit in units] == [(0, 1)] * 3
    every = logits(model)
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    with search.swapped(model, units) as to:
        to([0, 1, 0])
        skipped = logits(model)
        to([0, 0, 0])
        assert torch.equal(logits(model), every)
    assert torch.equal(logits(model), every)
    assert all("forward" not in layer.__dict__ for layer in layers)
    # the same model without that block
    middle = layers[1]
    del layers[1]
    assert torch.equal(logits(model), skipped)
    assert not torch.allclose(skipped, every)
    layers.insert(1, middle)


def test_a_block_whose_further_outputs_are_read_is_not_skipped():
    model = tiny_t5().eval()
    batch = {"input_ids": IDS, "labels": IDS}
    units = search.levels_of(model, "skip")
    with torch.no_grad(), search.swapped(model, units) as to:
        to([0] * len(units))
        every = model(**batch).logits
        to([1] + [0] * (len(units) - 1))
        with pytest.raises(UnsupportedError):
            model(**batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, every)


def test_a_search_of_blocks_to_skip_swaps_skipped_and_run_ones():
    model = tiny_llama(4).eval()
    units = search.levels_of(model, "skip")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    distance = search.Divergence(model, [batch])
    with search.swapped(model, units) as to:

        def fitness(state, tokens):
            to(state)
            return distance(tokens)

        found = search.evolve(
            [unit.levels for unit in units], 2, fitness, generations=6, stages=((1, 100),)
        )
        every = [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)]
        values = {state: fitness(state, 100) for state in every if sum(state) == 2}
    assert found.state == min(values, key=values.__getitem__)
