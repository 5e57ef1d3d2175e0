"""Adapters of experts that earlier versions saved load with the same outputs, or are refused."""

import json

import pytest
import torch
from mixtures import IDS, SIZES, TOP_2, adapted, error, mixture, stir
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

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
    with pytest.raises(InputError):
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


def checkpoint(family, folder):
    """A tiny model on disk, where each projection of each expert has a tensor."""
    torch.manual_seed(0)
    if family == "mixtral":
        config = MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2)
    else:
        config = JambaConfig(
            **SIZES, num_experts=6, num_experts_per_tok=2, attn_layer_period=2,
            attn_layer_offset=0, expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=4,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def outputs(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits.detach()


ALL = ["q_proj", "o_proj", "gate", "w1", "w2", "w3"]
EARLIER = {  # family, targets, fields, layers without
    "all and the router": ("mixtral", ALL, {"lora_dropout": 0.1}, ()),
    "with a scale by the root of the rank": ("mixtral", ALL, {"use_rslora": True}, ()),
    "one of gate and up": ("mixtral", ["w1", "q_proj"], {}, ()),
    "gate and up": ("mixtral", ["w1", "w3"], {}, ()),
    "one block": ("mixtral", ALL[:2] + ALL[3:], {"layers_to_transform": [1]}, ("layers.0.",)),
    "without an expert": ("mixtral", ["w2"], {"exclude_modules": r".*experts\.2\..*"}, (".2.w",)),
    "ranks that differ": (
        "mixtral",
        ["q_proj", "w1", "w2", "w3"],
        {"rank_pattern": {"w1": 2, "q_proj": 5}, "alpha_pattern": {"w1": 12, "w2": 3}},
        (),
    ),
    "a family that PEFT does not convert": (
        "jamba",
        ["q_proj", "gate_proj", "up_proj", "down_proj"],
        {},
        (),
    ),
}


@pytest.mark.cells(3)
@pytest.mark.parametrize("case", EARLIER)
def test_a_lora_of_transformers_4_computes_as_its_base_with_the_updates_added(case, tmp_path):
    family, targets, fields, without = EARLIER[case]
    base, weights = tmp_path / "base", checkpoint(family, tmp_path / "base")
    ranks, alphas = (fields.get(f"{name}_pattern", {}) for name in ("rank", "alpha"))
    changed, tensors = dict(weights), {}
    for key, W in weights.items():
        path, name = key.removesuffix(".weight"), key.split(".")[-2]
        if name not in targets or any(each in key for each in without):
            continue
        r = ranks.get(name, 4)
        A, B = torch.randn(r, W.shape[1]) * 0.2, torch.randn(W.shape[0], r) * 0.2
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
        changed[key] = W + alphas.get(name, 8) / (r**0.5 if "use_rslora" in fields else r) * B @ A
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    (adapter / CONFIG).write_text(json.dumps({**config, "target_modules": targets, **fields}))
    model = petl.load(AutoModelForCausalLM.from_pretrained(base), adapter, adapter_name="other")
    found = model.eval()(IDS).logits.detach()
    before = outputs(base)
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    assert error(found, outputs(base)) < 1e-5 < 0.05 < error(before, outputs(base))
    # and as it is saved now
    model.save_pretrained(tmp_path / "now")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    again = petl.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "now" / "other")
    assert torch.equal(again.eval()(IDS).logits, found)


def test_a_lora_of_transformers_4_without_a_projection_is_refused(tmp_path):
    checkpoint("mixtral", tmp_path / "base")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w2"]}
    tensors = {
        f"base_model.model.model.layers.{i}.block_sparse_moe.experts.{e}.w2.lora_{side}.weight":
        torch.ones((2, 24) if side == "A" else (32, 2))
        for i in range(2) for e in range(6) for side in "AB"
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    missing = next(key for key in tensors if ".1.block_sparse_moe.experts.3.w2.lora_B" in key)
    save_file({k: t for k, t in tensors.items() if k != missing}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"3\.w2\.lora_B"):
        petl.load(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path)
    magnitude = missing.replace("lora_B.weight", "lora_magnitude_vector")
    save_file(tensors | {magnitude: torch.ones(32)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError):
        petl.load(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path)
