"""LoRA on stacks of experts equals PEFT's and the dense equation; files go both ways."""

import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import peft
import pytest
import torch
from mixtures import IDS, MODELS, adapted, error, mixture, stir
from torch import Tensor, nn

import petl
from petl.core.compat import ParamWrapper
from petl.core.experts.lora import FusedExperts
from petl.core.layers.class_swap import restore_class
from petl.core.model.weight_changes import weight_changes
from petl.errors import InputError, UnsupportedError


def peft_own(model: peft.PeftModel) -> peft.PeftModel:
    """The model with PEFT's forward pass, in place."""
    for layer in model.modules():
        restore_class(layer, FusedExperts)
    return model


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and gradients by name."""
    model.zero_grad()
    y = model(IDS).logits
    y.square().mean().backward()
    return y.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_those_of_peft_and_the_start_those_of_the_base(name):
    model = adapted(name, stirred=False, dtype=torch.float64)
    with torch.no_grad(), model.disable_adapter():
        base = model(IDS).logits
    assert error(model(IDS).logits.detach(), base) < 2e-7
    stir(model)
    y, gradients = run(model)
    expected, theirs = run(peft_own(model))
    assert error(y, base) > 0.05
    # norms and routers of these models compute in float32
    assert error(y, expected) < 5e-7
    assert gradients.keys() == theirs.keys()
    assert max(error(g, theirs[n]) for n, g in gradients.items()) < 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_merging_changes_the_stack_and_unmerging_restores_it(name):
    model = adapted(name)
    y, before = model(IDS).logits, copy.deepcopy(model.get_base_model().state_dict())
    model.merge_adapter(safe_merge=True)
    assert error(model(IDS).logits, y) < 2e-6
    model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert max(error(after[n].float(), before[n].float()) for n in before) < 1e-6
    merged = model.merge_and_unload()
    assert error(merged(IDS).logits, y) < 2e-6
    assert not any(isinstance(module, ParamWrapper) for module in merged.modules())


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_all_implementations_agree(name, way):
    expected = run(adapted(name, dtype=torch.float64))
    model = adapted(name, dtype=torch.float64)
    model.get_base_model().set_experts_implementation(way)
    y, gradients = run(model)
    assert error(y, expected[0]) < 2e-7
    assert max(error(g, expected[1][n]) for n, g in gradients.items()) < 2e-6


@pytest.mark.thorough
def test_an_adapted_mixture_compiles_as_one_graph():
    model = adapted("qwen3_moe")
    expected = model(IDS).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert error(compiled(IDS, use_cache=False).logits, expected) < 1e-6


def test_dropout_is_that_of_each_expert_and_off_in_evaluation(tmp_path):
    model = adapted("qwen3_moe", lora_dropout=0.5)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    exact = adapted("qwen3_moe")(IDS).logits
    assert torch.equal(model(IDS).logits, exact)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    model.save_pretrained(tmp_path)  # PEFT would refuse to load it with dropout
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
    assert model.peft_config["default"].lora_dropout == 0.5


def test_a_base_in_half_precision_keeps_float32_and_merges_nothing_that_rounding_removes():
    model = petl.wrap(
        mixture("qwen3_moe").bfloat16(), "lora", target_parameters=["down_proj"], target_modules=[]
    )
    stir(model)
    y, gradients = run(model)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    changes = weight_changes(model.get_base_model(), ["default"])
    assert changes.keys() == {f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)}
    assert all(1 < change < 300 for change in changes.values())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-4
    with pytest.raises(UnsupportedError):
        model.merge_adapter()
    model.merge_adapter(lossy=True)


def test_two_adapters_switch_add_up_and_delete():
    model = adapted("qwen3_moe")
    first = model(IDS).logits
    config = copy.deepcopy(model.peft_config["default"])
    config.r = 2
    model.add_adapter("second", config)
    assert torch.equal(model(IDS).logits, first)
    stir(model, "second")
    model.set_adapter("second")
    second = model(IDS).logits
    assert error(second, first) > 0.01
    model.base_model.set_adapter(["default", "second"])
    both = model(IDS).logits
    model.merge_adapter()
    assert error(model(IDS).logits, both) < 2e-6
    model.unmerge_adapter()
    model.set_adapter("second")
    model.delete_adapter("default")
    assert error(model(IDS).logits, second) < 1e-5


LOAD_WITH_PEFT = """
import sys, torch
from pathlib import Path
from peft import PeftModel
for case in map(Path, sys.argv[1:]):
    base, ids = torch.load(case / "base.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, case / "ours").eval()
    torch.save(model(ids).logits.detach(), case / "y.pt")
assert "petl" not in sys.modules
"""


@pytest.mark.thorough
def test_peft_loads_our_files_and_we_load_theirs(tmp_path):
    outputs = {}
    for name in ("qwen3_moe", "gpt_oss", "llama4"):
        model = adapted(name, lora_dropout=0.1, use_rslora=name == "gpt_oss")
        case = tmp_path / name
        outputs[case] = y = model(IDS).logits.detach()
        model.save_pretrained(case / "ours")
        torch.save((mixture(name), IDS), case / "base.pt")
        peft_own(model).save_pretrained(case / "theirs")
        loaded = petl.load(mixture(name), case / "theirs")
        assert any(isinstance(module, FusedExperts) for module in loaded.modules())
        assert torch.equal(loaded(IDS).logits, y)
    subprocess.run([sys.executable, "-c", LOAD_WITH_PEFT, *map(str, outputs)], check=True)
    for case, y in outputs.items():
        assert error(torch.load(case / "y.pt"), y) < 1e-6


def test_values_that_a_stack_cannot_have_are_refused_before_the_model_changes():
    model = mixture("qwen3_moe")
    fields = {"target_parameters": ["gate_up_proj"], "target_modules": []}
    before = str(model)
    for wrong in ({"init_lora_weights": "pissa"}, {"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            petl.wrap(model, "lora", **fields, **wrong)
    model.set_experts_implementation("batched_mm")
    model.config._experts_implementation_internal = "deepgemm"
    with pytest.raises(UnsupportedError):
        petl.wrap(model, "lora", **fields)
    assert str(model) == before


@pytest.mark.parametrize("name", [name for name in MODELS if name != "jetmoe"])
def test_a_row_of_a_mixed_batch_has_its_own_adapter(name):
    model = adapted(name, target_modules="block-linear", target_parameters=None)
    model.add_adapter("second", replace(model.peft_config["default"], r=2))
    stir(model, "second")
    names, rows = ["second", "default", "__base__", "second"], IDS.repeat(2, 1)
    with torch.no_grad():
        mixed = model.eval()(rows, adapter_names=names).logits
        for row, own in enumerate(names[:3]):
            model.set_adapter(own if own in model.peft_config else "default")
            with model.disable_adapter() if own == "__base__" else nullcontext():
                alone = model(rows[row : row + 1]).logits
            assert error(mixed[row : row + 1], alone) < 1e-5
    assert error(mixed[2], mixed[0]) > 0.01


def test_rows_of_sorted_tokens_are_refused():
    model = petl.wrap(mixture("jetmoe"), "mola", target_modules="experts", num_experts=2)
    with pytest.raises(UnsupportedError, match="JetMoeParallelExperts"):
        model.eval()(IDS, adapter_names=["default", "__base__"])
