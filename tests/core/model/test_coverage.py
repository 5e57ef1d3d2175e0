"""The share of block weights that adapters reach, and what is said of it."""

import logging

import pytest
import torch
from architectures.small import Type
from torch import nn
from transformers import JambaConfig, JambaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import petl
from petl import testing
from petl.core.model.coverage import coverage_of

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def qwen3_moe():
    sizes = {**SIZES, "num_hidden_layers": 2, "head_dim": 8, "num_experts": 4}
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM(config)


def hybrid():
    """Attention in one block of four, Mamba in the others; no experts."""
    where = {"attn_layer_offset": 3, "attn_layer_period": 4, "num_experts": 1, "mamba_d_state": 4}
    return JambaForCausalLM(
        JambaConfig(**SIZES, **where, num_hidden_layers=4, intermediate_size=48)
    )


def test_the_share_is_that_of_the_weights_of_the_blocks():
    model = petl.wrap(testing.tiny_llama(), "lora", target_modules=["q_proj", "down_proj"])
    attention = {"q": 64 * 64, "k": 64 * 32, "v": 64 * 32, "o": 64 * 64}
    total = sum(attention.values()) + 3 * 64 * 96
    found = coverage_of(model)
    assert found.share == pytest.approx((attention["q"] + 64 * 96) / total)
    assert found.missed["self_attn.v_proj"] == pytest.approx(attention["v"] / total)
    assert list(found.missed)[:2] == ["mlp.gate_proj", "mlp.up_proj"]
    assert "adapters reach 33.3 % of the block weights; not reached: mlp.gate_proj" in str(found)


def test_each_of_several_equal_parameters_of_a_module_counts():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("gate", "up", "down"):
                self.register_parameter(name, nn.Parameter(torch.ones(2, 4, 4)))

    model = testing.tiny_llama()
    for layer in model.model.layers:
        layer.mlp.shared = Shared()
    found = coverage_of(petl.wrap(model, "lora", target_modules="block-linear"))
    linear = sum(p.numel() for n, p in model.named_parameters() if "base_layer" in n)
    assert found.share == pytest.approx(linear / (linear + 3 * 3 * 32))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("method", ["lora", "mola"])
def test_the_layers_of_a_dense_model_are_all_reached(name, method):
    case = testing.TINY_MODELS[name]
    model = petl.wrap(case.base(), method, target_modules="block-linear")
    found = coverage_of(model)
    # T5 has one table of positions, an embedding, in the first block of each stack
    assert found.share == 1
    assert not found.missed
    assert not found.bare


def test_modules_trained_in_full_are_reached_and_methods_without_weights_have_none():
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}
    found = coverage_of(petl.wrap(testing.tiny_llama(), "lora", **fields))
    assert found.missed.keys() == {f"self_attn.{name}_proj" for name in "kvo"}
    assert coverage_of(petl.wrap(testing.tiny_bert(), "ln_tuning")) is None


def test_parameters_of_experts_are_reached_one_by_one():
    fields = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    model = petl.wrap(qwen3_moe(), "lora", **fields)
    total = 3 * 32 * 32 + 4 * 3 * 16 * 32 + 4 * 32  # attention, experts, router
    reached = 32 * 32 + 4 * 16 * 32
    assert coverage_of(model).share == pytest.approx(reached / total)
    assert coverage_of(petl.wrap(qwen3_moe(), "lora", target_modules=SEVEN)).missed.keys() == {
        "mlp.gate"
    }


@pytest.mark.parametrize(
    ("build", "method", "fields"),
    [
        (qwen3_moe, "loha", {"target_modules": "block-linear"}),
        (qwen3_moe, "mola", {"target_modules": "attention-linear"}),
        (qwen3_moe, "lora", {"target_modules": ["q_proj", "v_proj"]}),
        (hybrid, "lora", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    ],
)
def test_a_low_share_is_a_warning(build, method, fields, caplog):
    petl.wrap(build(), method, **fields)
    (record,) = [r for r in caplog.records if "of the block weights" in r.message]
    assert record.levelno == logging.WARNING
    assert "not reached: " in record.message


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {}),
        ("lora", {"target_modules": ["q_proj"]}),
        ("mola", {"layers_to_transform": [0]}),
        ("adapter", {}),
    ],
)
def test_a_share_that_was_asked_for_is_a_note(method, fields, caplog):
    with caplog.at_level(logging.INFO):
        petl.wrap(testing.tiny_llama(), method, **fields)
    (record,) = [r for r in caplog.records if "of the block weights" in r.message]
    assert record.levelno == logging.INFO


@pytest.mark.parametrize(
    ("kind", "fields", "layer"),
    [
        ("causal/dbrx", {}, "ffn.experts"),  # PEFT's own choice leaves out what is no linear layer
        ("speech/sew", {"target_modules": "block-linear"}, "conv"),
        ("speech/sew", {}, "conv"),
    ],
)
def test_weights_that_no_preset_reaches_are_a_warning_without_a_way_out(
    kind, fields, layer, caplog
):
    petl.wrap(Type(*kind.split("/")).build(), "lora", **fields)
    (record,) = [r for r in caplog.records if "of the block weights" in r.message]
    assert record.levelno == logging.WARNING
    assert f"not reached: {layer}" in record.message
    assert "target_modules=" not in record.message


def test_weights_of_a_quantized_base_that_are_not_quantized_are_said():
    model = petl.wrap(qwen3_moe(), "lora", target_modules=["q_proj"])
    base = model.get_base_model()
    base.is_loaded_in_4bit = True
    for layer in base.modules():
        if isinstance(layer, nn.Linear):  # as bitsandbytes packs them
            packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
            layer.weight = nn.Parameter(packed, requires_grad=False)
    total = 3 * 32 * 32 + 4 * 3 * 16 * 32 + 4 * 32
    found = coverage_of(model)
    assert found.share == pytest.approx(32 * 32 / total)
    assert f"{100 * (1 - 3 * 32 * 32 / total):.1f} % of them are not quantized" in str(found)
