"""Adapters of petl's methods on stacked experts; their outputs are checked by the contract."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import petl
from petl import testing
from petl.core.experts.layer import AdaptedExperts
from petl.testing import Case

MOLA = {"num_experts": 3, "top_k": 2, "target_modules": ["experts"]}


def increlora():
    """A model whose experts have grown to different ranks."""
    model = Case("increlora", "qwen3_moe", {"init_r": 1, "target_modules": ["experts"]}).wrap()
    growth = next(iter(model.base_model.placed["default"].values())).growth
    for index, adapter in enumerate(growth.layers.values()):
        if index % 3 == 0:
            adapter.grow(1, step=1)
    return testing.stir(model)


def test_a_file_has_one_tensor_for_all_experts_of_a_stack(tmp_path):
    model = Case("mola", "qwen3_moe", MOLA).wrap()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    stack = "base_model.model.model.layers.1.mlp.experts.petl_mola_adapters.down_proj"
    own = {key.removeprefix(f"{stack}."): t for key, t in saved.items() if key.startswith(stack)}
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == {
        "lora_A": (4, 24, 24),
        "lora_B": (4, 32, 24),
        "router": (4, 3, 24),
    }
    linears = model.get_base_model().model.layers[1].mlp.experts.linears.down_proj
    for expert, layer in enumerate(linears.children()):
        assert torch.equal(own["lora_A"][expert], layer.adapters["default"].lora_A)


def test_experts_of_different_ranks_are_saved_and_loaded(tmp_path):
    model, batch = increlora(), Case("mola", "qwen3_moe").batch()
    model.save_pretrained(tmp_path)
    loaded = petl.load(Case("mola", "qwen3_moe").base(), tmp_path, adapter_name="other")
    assert len(set(loaded.active_peft_config.rank_pattern.values())) > 1
    assert torch.equal(testing.logits(loaded, batch), testing.logits(model, batch))


def test_padding_does_not_count_in_the_balance_of_an_expert():
    case = Case("mola", "qwen3_moe", MOLA)
    model, batch = case.wrap().train(), case.batch()
    model(**batch)
    picks = model.base_model.context.series["picks"]
    stack = "layers.1.mlp.experts.linears.gate_up_proj"
    of_stack = [n for key, n in picks.items() if stack in key]
    # each token has 2 experts, of which each picks 2
    assert sum(float(n.sum()) for n in of_stack) == 4 * int(batch["attention_mask"].sum())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unloading_leaves_the_module_as_it_was(device):
    base = Case("mola", "qwen3_moe").base().to(device)
    before = {name: type(module) for name, module in base.named_modules()}
    model = petl.wrap(base, "mola", **MOLA)
    assert any(isinstance(module, AdaptedExperts) for module in model.modules())
    after = {name: type(module) for name, module in model.unload().named_modules()}
    assert after == before


def test_a_copy_has_weights_of_its_own():
    model, batch = increlora(), Case("mola", "qwen3_moe").batch()
    other = copy.deepcopy(model)
    expected = testing.logits(model, batch)
    assert torch.equal(testing.logits(other, batch), expected)
    merged = testing.logits(copy.deepcopy(other).merge_and_unload(), batch)
    assert testing.difference(merged, expected) < 1e-5
    with torch.no_grad():
        other.get_base_model().model.layers[0].mlp.experts.down_proj.zero_()
    assert not torch.equal(testing.logits(other, batch), testing.logits(model, batch))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mola", "mos"])
def test_a_compiled_model_computes_the_same(method):
    fields = {"mola": MOLA, "mos": {"r": 3, "equivalent_rank": 2, "target_modules": ["experts"]}}
    case = Case(method, "qwen3_moe", fields[method])
    model, batch = case.wrap_stirred(), case.batch()
    expected = testing.logits(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    assert testing.difference(testing.logits(compiled, batch), expected) < 1e-5
    own = testing.gradients(model, batch)
    for name, gradient in testing.gradients(compiled, batch).items():
        assert testing.difference(gradient, own[name.removeprefix("_orig_mod.")]) < 1e-5
