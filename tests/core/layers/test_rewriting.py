"""Adapters that compute a new weight from the base weight."""

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
