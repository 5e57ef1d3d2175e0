"""Adapters that compute a new weight from the base weight."""

from copy import deepcopy

import pytest
import torch

import petl
from petl import testing


@pytest.mark.parametrize("name", ["pst", "dsee"])
def test_unmerging_a_model_that_was_cast_gives_the_cast_base_weight(name):
    model, base = petl.wrap(testing.tiny_llama(), name), testing.tiny_llama().bfloat16()
    testing.stir(model).merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    for key, layer in testing.tuner_layers(model).items():
        weight = base.get_submodule(key.removeprefix("base_model.model.")).weight
        assert torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize("name", ["pst", "dsee"])
def test_the_change_of_a_merged_model_that_was_cast_is_that_of_an_unmerged_one(name):
    model = testing.stir(petl.wrap(testing.tiny_llama(), name))
    merged = deepcopy(model)
    merged.merge_adapter()
    one, other = (testing.tuner_layers(each.to(torch.bfloat16)) for each in (merged, model))
    for key, layer in one.items():
        change = layer.get_delta_weight("default")
        assert change.any()
        assert torch.equal(change, other[key].get_delta_weight("default")), key
