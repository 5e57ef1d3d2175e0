"""IncreLoRA's adapters: saving, merging, export as plain LoRA."""

from typing import Any

import pytest
import torch
from increlora_fixtures import ADAPTER, dense, grown, layers, tokens, train, trained
from peft import PeftModel
from safetensors.torch import load_file, save_file

import petl
from petl.adapters.export.conversion import as_lora, save_lora
from petl.errors import InputError
from petl.methods.increlora import growth_finished, importance_scores, rank_pattern
from petl.testing import tiny_llama


def same_outputs(one: PeftModel, other: PeftModel, tolerance: float = 1e-6) -> None:
    batch = tokens(3, seed=9)
    expected = one.eval()(**batch).logits
    torch.testing.assert_close(other.eval()(**batch).logits, expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(
    ("steps", "is_trainable"), [(3, True), (8, False)], ids=["in growth", "after growth"]
)
def test_adapter_saves_and_loads(tmp_path, steps, is_trainable):
    model = grown(target_total_rank=24, top_h=4, rank_step=2)
    optimizer = torch.optim.SGD(trained(model), lr=0.01)
    train(model, range(1, steps + 1), optimizer)
    model.save_pretrained(tmp_path)
    finished = growth_finished(model)
    assert finished == (steps == 8)
    ranks = rank_pattern(model)
    saved = load_file(tmp_path / ADAPTER)
    for key, layer in layers(model).items():
        rows = ranks[key] if finished else layer.E.shape[0]
        stem = f"base_model.model.{key}.petl_increlora_adapters."
        assert saved[f"{stem}lora_A"].shape[0] == saved[f"{stem}lora_B"].shape[1] == rows
        assert saved[f"{stem}steps"].shape == (2, rows)
        assert int(saved[f"{stem}rank"]) == ranks[key]
    for loader in (petl.load, PeftModel.from_pretrained):
        loaded = loader(tiny_llama(2), tmp_path, is_trainable=is_trainable)
        assert loaded.peft_config["default"].rank_pattern == ranks
        assert rank_pattern(loaded) == ranks
        assert importance_scores(loaded) == importance_scores(model)
        assert growth_finished(loaded) == (finished or not is_trainable)
        same_outputs(model, loaded)
        full = is_trainable and not finished
        for key, layer in layers(loaded).items():
            assert layer.E.shape[0] == (layers(model)[key].E.shape[0] if full else ranks[key])
        again = tmp_path / f"again-{loader.__name__}"
        loaded.save_pretrained(again)
        same_outputs(model, petl.load(tiny_llama(2), again))


def test_compact_file_loads_into_a_model_of_full_capacity(tmp_path):
    model = grown(target_total_rank=24, top_h=4, rank_step=2)
    train(model, range(1, 9), torch.optim.SGD(trained(model), lr=0.01))
    model.save_pretrained(tmp_path)
    other = grown(target_total_rank=24, top_h=4, rank_step=2)
    assert not growth_finished(other)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert growth_finished(other)
    assert rank_pattern(other) == rank_pattern(model)
    same_outputs(model, other)


def test_files_whose_components_do_not_fit_raise(tmp_path):
    grown(target_total_rank=50, top_h=2).save_pretrained(tmp_path)
    model = grown(target_total_rank=24, top_h=4, rank_step=2)
    with pytest.raises(InputError, match="17 components"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    weights = load_file(tmp_path / ADAPTER)
    name = next(key for key in weights if key.endswith(".E"))
    save_file({**weights, name: weights[name][:3]}, tmp_path / ADAPTER)
    with pytest.raises(InputError, match="number of components"):
        petl.load(tiny_llama(2), tmp_path)


def test_merging_uses_the_active_components_only():
    model = grown()
    train(model, range(1, 4), torch.optim.SGD(trained(model), lr=0.01))
    batch = tokens(3)
    expected = model.eval()(**batch).logits
    weights = {k: m.base_layer.weight.clone() for k, m in modules(model)}
    model.merge_adapter()
    for key, module in modules(model):
        update = dense(layers(model)[key])
        torch.testing.assert_close(module.base_layer.weight, weights[key] + update)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    for key, module in modules(model):
        torch.testing.assert_close(module.base_layer.weight, weights[key])


@pytest.mark.parametrize("steps", [3], ids=["in growth"])
def test_exports_as_a_plain_lora_with_its_ranks(tmp_path, steps):
    model = grown(target_total_rank=24, top_h=4)
    train(model, range(1, steps + 1), torch.optim.SGD(trained(model), lr=0.01))
    save_lora(*as_lora(model), tmp_path)
    exported = PeftModel.from_pretrained(tiny_llama(2), tmp_path)
    assert exported.peft_config["default"].peft_type == "LORA"
    for key, rank in rank_pattern(model).items():
        module: Any = exported.get_base_model().get_submodule(key)
        assert module.r["default"] == rank
    same_outputs(model, exported, tolerance=1e-4)


def modules(model: PeftModel) -> list[tuple[str, Any]]:
    base = model.get_base_model()
    return [(key, base.get_submodule(key)) for key in layers(model)]
