"""Adapters of experts that earlier versions saved load with the same outputs, or are refused."""

import json

import pytest
import torch
from mixtures import IDS, SIZES, TOP_2, adapted, error, mixture, stir
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import petl
from petl.core.adapter_file import WEIGHTS
from petl.core.adapter_folder import CONFIG
from petl.core.experts.stacks import saved_factors, stacked_factors
from petl.errors import InputError


def rewrite(folder, tensors=None, **config):
    """Change files of a saved adapter."""
    if tensors is not None:
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS)
    file = folder / CONFIG
    known = json.loads(file.read_text()) | config
    file.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))
    (folder / "base_fingerprint.json").unlink(missing_ok=True)


def with_earlier_sides(tensors):
    """The tensors as PEFT before 0.21 saved them."""
    found = {}
    for key, A in tensors.items():
        if ".lora_A." in key:
            B = tensors[key.replace("lora_A", "lora_B")]
            stacks = stacked_factors(A, B, 6, swapped=False)
            found[key], found[key.replace("lora_A", "lora_B")] = saved_factors(
                *stacks, swapped=True
            )
    return found


def test_files_of_earlier_versions_are_told_by_shapes_and_by_the_version(tmp_path):
    # 24 inner widths: the stack `down_proj` has as many inputs as outputs
    for name in ("qwen3_moe", "llama4"):
        model = adapted(name)
        y = model(IDS).logits.detach()
        folder = tmp_path / name
        model.save_pretrained(folder)
        rewrite(folder, with_earlier_sides(load_file(folder / WEIGHTS)), peft_version="0.18.1")
        assert error(petl.load(mixture(name), folder)(IDS).logits, y) < 1e-6


def test_square_stacks_need_the_version(tmp_path):
    def square():
        torch.manual_seed(0)
        sizes = SIZES | {"hidden_size": 32}
        config = Qwen2MoeConfig(**sizes, **TOP_2 | {"moe_intermediate_size": 32}, num_experts=6)
        return Qwen2MoeForCausalLM(config).eval()

    model = petl.wrap(square(), "lora", target_parameters=["down_proj"], target_modules=[])
    stir(model)
    y = model.eval()(IDS).logits.detach()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert torch.equal(petl.load(square(), tmp_path)(IDS).logits, y)
    rewrite(tmp_path, with_earlier_sides(tensors), peft_version="0.20.0")
    assert error(petl.load(square(), tmp_path)(IDS).logits, y) < 1e-6
    rewrite(tmp_path, peft_version=None)
    with pytest.raises(InputError, match="peft_version"):
        petl.load(square(), tmp_path)


def test_the_layers_of_each_expert_of_transformers_4_become_stacks(tmp_path):
    model = adapted("qwen3_moe")
    model.save_pretrained(tmp_path)
    y = model(IDS).logits.detach()
    stacked, found = load_file(tmp_path / WEIGHTS), {}
    for key, A in stacked.items():
        if ".lora_A." not in key:
            continue
        A, B = stacked_factors(A, stacked[key.replace("lora_A", "lora_B")], 6, swapped=False)
        path, is_up = key.partition(".experts.")[0] + ".experts", ".base_layer." in key
        for e in range(6):
            names = ("gate_proj", "up_proj") if is_up else ("down_proj",)
            for name, part in zip(names, B[e].chunk(len(names)), strict=True):
                found[f"{path}.{e}.{name}.lora_A.weight"] = A[e].clone()
                found[f"{path}.{e}.{name}.lora_B.weight"] = part.clone()
    names = ["gate_proj", "up_proj", "down_proj"]
    rewrite(tmp_path, found, target_modules=names, target_parameters=None)
    loaded = petl.load(mixture("qwen3_moe"), tmp_path)
    assert error(loaded(IDS).logits, y) < 1e-6
    layer = next(m for n, m in loaded.named_modules() if n.endswith("experts.base_layer"))
    assert layer.r["default"] == 8  # gate and up have ranks of their own
