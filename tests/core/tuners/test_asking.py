"""Sums of adapters and merging: exact by dense matrices, or refused before anything changes."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.conversion import save_as_lora
from torch import nn

import petl
from petl.errors import InputError, UnsupportedError
from petl.testing import tiny_llama
from petl.testing.bases import tiny_mamba
from petl.testing.case import assert_close, logits, stir, tuner_layers
from petl.testing.models import causal_batch

FIELDS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "binary": {"inner": "lora"},
    "compacter": {},
    "corda": {"r": 4, "calibration": [causal_batch(4, seed=3)]},
    "dora": {},
    "dsee": {},
    "increlora": {},
    "mola": {},
    "mos": {"r": 2},
    "pst": {},
    "rslora": {},
    "sparse": {},
}
MERGING = ("binary", "dsee", "increlora", "mos", "sparse", "lora", "rslora")
COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BATCH = causal_batch(2, seed=0)


def with_two(name: str, base: Any = None) -> PeftModel:
    """A model with adapters "default" and "other", both with an effect."""
    fields = FIELDS.get(name, {})
    model = stir(petl.wrap(base or tiny_llama(2), name, **fields))
    if name != "corda":
        model.add_adapter("other", petl.build_config(name, **fields))
        model.set_adapter("other")
        stir(model, "other", seed=3)
    return model.eval()


def summed(model: PeftModel, weights: dict[str, float]) -> torch.nn.Module:
    """The base with the dense updates added to its weights."""
    plain = tiny_llama(2)
    for key, layer in tuner_layers(model).items():
        weight = plain.get_submodule(key.removeprefix("base_model.model.")).weight
        for name, factor in weights.items():
            weight.data += factor * layer.get_delta_weight(name).detach()
    return plain


@pytest.mark.parametrize("name", FIELDS)
def test_a_sum_of_adapters_is_refused_before_anything_changes(name):
    model = with_two(name)
    before = set(model.state_dict())
    names = list(model.peft_config)
    for combination in COMBINATIONS:
        with pytest.raises(UnsupportedError):
            model.add_weighted_adapter(names, [0.5] * len(names), "c", combination, density=0.5)
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == names


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_a_sum_of_loras_is_that_of_their_dense_updates(combination):
    model = with_two("lora")
    weights = {"default": 0.7, "other": -0.4}
    expected = logits(summed(model, weights), BATCH)
    model.add_weighted_adapter([*weights], [*weights.values()], "c", combination, svd_rank=16)
    model.set_adapter("c")
    assert_close(logits(model, BATCH), expected, 1e-5, "logits of the sum")


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", MERGING)
def test_several_adapters_merge_to_the_sum_of_their_dense_updates(name):
    model = with_two(name)
    both = {"default": 1.0, "other": 1.0}
    expected = logits(summed(model, both), BATCH)
    single = logits(model, BATCH)
    model.merge_adapter([*both])
    assert_close(logits(model, BATCH), expected, 1e-5, "logits, merged")
    model.unmerge_adapter()
    assert_close(logits(model, BATCH), single, 1e-5, "logits, merged and unmerged")
    tuner: Any = model.base_model
    tuner.set_adapter([*both])
    assert_close(logits(model, BATCH), expected, 1e-5, "logits with both active")
    copied = copy.deepcopy(model).merge_and_unload(adapter_names=[*both])
    assert_close(logits(copied, BATCH), expected, 1e-5, "logits of the merged model")
    model.delete_adapter("default")
    assert_close(logits(model, BATCH), single, 1e-5, "logits after deleting the other one")


@pytest.mark.parametrize("name", ["binary", "increlora", "sparse"])
def test_a_tied_weight_is_not_merged_into(name):
    base: Any = tiny_llama(2)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = stir(petl.wrap(base, name, target_modules=["lm_head", "q_proj"], **FIELDS[name]))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError):
            merge()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_layer_that_also_stands_elsewhere_is_not_merged_into():
    base: Any = nn.Module()
    base.first = base.second = nn.Linear(16, 16)  # PEFT adapts it in the first place only
    base.forward = lambda x: base.second(base.first(x))
    model = stir(petl.wrap(base, "sparse", target_modules=["first"]))
    before = base.second.weight.clone()
    with pytest.raises(UnsupportedError):
        model.merge_and_unload()
    assert torch.equal(base.second.weight, before)


def test_a_block_that_runs_twice_is_merged():
    base: Any = nn.Module()
    base.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16))] * 2)
    base.forward = lambda x: base.blocks[1](base.blocks[0](x))
    model = stir(petl.wrap(base, "sparse", target_modules=["blocks.0.0"])).eval()
    x = torch.randn(3, 16)
    expected = model.base_model.model(x)
    assert_close(model.merge_and_unload()(x), expected, 1e-5, "outputs before and after merging")


def test_the_conversion_of_a_corda_adapter_is_refused(tmp_path):
    model = with_two("corda")
    with pytest.raises(UnsupportedError, match="original weights"):
        model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path)


def test_a_layer_that_no_lora_may_adapt_is_not_converted(tmp_path):
    model = petl.wrap(tiny_mamba(), "increlora", target_modules=["in_proj", "out_proj"])
    with pytest.raises(InputError, match="out_proj"):
        save_as_lora(tmp_path, stir(model), rank=2)


@pytest.mark.parametrize(("left_out", "told"), [("gate_proj", 0), ("no_such_layer", 1)])
def test_a_layer_that_was_left_out_is_not_told_as_missing(left_out, told, recwarn, caplog):
    petl.wrap(tiny_llama(), "mola", exclude_modules=[left_out])
    assert sum("exclude_modules" in each for each in caplog.messages) == told
    assert not recwarn  # PEFT's warning of the same says it once more
