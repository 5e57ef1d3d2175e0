"""LoRA on stacks of experts: split by expert for vLLM, copied for PEFT, merged into checkpoints."""

from pathlib import Path

import pytest
import standin
from mixtures import IDS, error, mixture, stir
from safetensors.torch import load_file
from training_fixtures import write_model
from transformers import AutoModelForCausalLM

import petl
from petl.adapters.export.lora import export_for_vllm, export_lora
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find
from petl.core.adapter_file import WEIGHTS
from petl.core.adapter_folder import Folder
from petl.errors import UnsupportedError


def saved_on(name: str, folder: Path, **fields):
    """An adapter of a tiny mixture on disk, and its outputs."""
    write_model(folder / "base", lambda _: mixture(name), None)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = petl.wrap(base, "lora", r=4, task_type="CAUSAL_LM", **fields)
    stir(model)
    y = model.eval()(IDS).logits.detach()
    model.save_pretrained(folder / "adapter")
    return find(folder / "adapter"), y


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_exports_and_merged_checkpoints_have_the_outputs_of_the_adapter(name, tmp_path, device):
    if device == standin.NAME:
        pytest.skip(f"the device has no {standin.LACKING['qwen3_moe']}")
    saved, y = saved_on(name, tmp_path, target_modules="block-linear", use_rslora=True)
    written = export_for_vllm(saved, tmp_path / "vllm", None)
    assert written.difference.relative < 1e-5 < 0.05 < written.difference.effect
    tensors, config = load_file(tmp_path / "vllm" / WEIGHTS), Folder(tmp_path / "vllm").config
    split = [key for key in tensors if ".experts.5.down_proj.lora_B" in key]
    assert bool(split) == (name != "gpt_oss")
    if split:
        assert not config.use_rslora
        assert all(tensor.dim() == 2 for tensor in tensors.values())
    if name == "qwen3_moe":  # of which PEFT reads such files too
        assert error(petl.load(mixture(name), tmp_path / "vllm")(IDS).logits, y) < 1e-5
    export_lora(saved, tmp_path / "peft", None)
    assert error(petl.load(mixture(name), tmp_path / "peft")(IDS).logits, y) < 1e-6
    merge(saved, tmp_path / "merged", None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert error(merged(IDS).logits, y) < 1e-5


def test_one_of_two_stacks_is_refused_for_vllm(tmp_path):
    saved, _ = saved_on("qwen3_moe", tmp_path, target_parameters=["down_proj"], target_modules=[])
    with pytest.raises(UnsupportedError):
        export_for_vllm(saved, tmp_path / "vllm", None)
    assert not (tmp_path / "vllm").exists()
