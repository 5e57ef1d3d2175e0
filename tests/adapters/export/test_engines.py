"""The commands by which engines serve an exported LoRA."""

import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

import petl
from petl.adapters.export.engines import ENGINES, refusal, serving_lines

BASE = "org/model name"


def saved(folder: Path, adapted: str = "model.layers.0.self_attn.q_proj", **fields) -> Path:
    settings = {"r": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    LoraConfig(**{**settings, **fields}, base_model_name_or_path=BASE).save_pretrained(folder)
    tensors = {f"base_model.model.{adapted}.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_the_lines_name_base_adapter_and_rank(tmp_path):
    folder = saved(tmp_path / "my lora", r=20, lora_alpha=20)
    vllm, sglang = map(shlex.split, serving_lines(folder))
    named = f"my lora={folder}"
    assert vllm[1:] == shlex.split(
        f"vllm serve '{BASE}' --enable-lora --max-lora-rank 32 --lora-modules '{named}'"
    )
    start = ["python", "-m", "sglang.launch_server", "--model-path", BASE]
    assert sglang[1:] == [*start, "--enable-lora", "--lora-paths", named]


def test_the_largest_rank_counts_if_all_scales_are_equal(tmp_path):
    patterns = {"rank_pattern": {"a": 100}, "alpha_pattern": {"a": 200}}
    (vllm, _) = serving_lines(saved(tmp_path, lora_alpha=16, **patterns))
    assert "--max-lora-rank 128" in vllm


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "trained copies"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"rank_pattern": {"a": 4}}, "several scales"),
        ({"alpha_pattern": {"a": 1}}, "several scales"),
        ({"r": 1024}, "rank 1024"),
    ],
)
def test_a_lora_that_engines_compute_otherwise_is_named(tmp_path, fields, reason):
    for line in serving_lines(saved(tmp_path, **fields)):
        assert reason in line
        assert "petl serve" in line


@pytest.mark.parametrize(
    ("adapted", "is_served"),
    [
        ("model.language_model.layers.0.self_attn.q_proj", True),
        ("model.text_model.layers.0.mlp.down_proj", True),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", False),
        ("model.visual.blocks.0.attn.qkv", False),
        ("model.multi_modal_projector.linear_1", False),
        ("model.audio_tower.layers.0.self_attn.q_proj", False),
    ],
)
def test_engines_serve_the_layers_of_the_language_model_alone(tmp_path, adapted, is_served):
    for line in serving_lines(saved(tmp_path, adapted)):
        assert ("beside the language model" not in line) == is_served
    found = petl.check(tmp_path, engine="vllm")
    assert ("engine.asked" not in {each.id for each in found}) == is_served


def test_a_base_of_random_weights_is_no_model_that_an_engine_loads(tmp_path):
    folder = saved(tmp_path)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    for line in serving_lines(folder):
        assert "its base model has random weights" in line


def test_stacks_of_experts_are_exported_for_vllm_once(tmp_path):
    folder = saved(tmp_path, target_parameters=["experts.down_proj"])
    before, after = (serving_lines(folder, for_vllm=is_done)[0] for is_done in (False, True))
    assert "--engine vllm" in before
    assert "petl export" not in after


def test_other_tasks_have_no_lines(tmp_path):
    assert serving_lines(saved(tmp_path, task_type="SEQ_CLS")) == []


def test_an_rslora_is_served_by_the_engines_that_read_its_scale(tmp_path):
    vllm, sglang = serving_lines(saved(tmp_path, r=16, use_rslora=True))
    assert "--max-lora-rank 16" in vllm
    assert "4.0 times too weak" in sglang


@pytest.mark.parametrize(
    ("fields", "engines"),
    [
        ({}, {*ENGINES}),
        ({"rank_pattern": {"q": 4}}, {"llama.cpp", "peft", "petl"}),
        ({"alpha_pattern": {"q": 4}}, {"peft", "petl"}),
        ({"use_rslora": True}, {"vllm", "peft", "petl"}),
        ({"peft_type": "VERA"}, {"peft", "petl"}),
        ({"peft_type": "PETL_MOLA"}, {"petl"}),
    ],
)
def test_the_table_says_which_engines_compute_the_same(fields, engines):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **fields}
    assert {name for name, each in ENGINES.items() if not refusal(config, each)} == engines
