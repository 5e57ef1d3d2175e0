"""Saved adapters load and give the logits recorded when they were saved.

The folders of `adapters/` are a promise to users who have saved adapters, which begins with version
0.2.0: from then on they are only added to (`scripts/make_compatibility_fixtures.py`). This file
uses public names
of petl, PEFT and transformers only, so that moving modules of the package does not touch it.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import compatibility_cases
import pytest
import torch
from compatibility_bases import base, logits
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import petl

ADAPTERS = Path(__file__).parent / "adapters"
NAMES = sorted(folder.name for folder in ADAPTERS.iterdir())
BASES = {name: compatibility_cases.ADAPTERS[name].base for name in NAMES}
# Of the largest logit. Not bitwise: other processors and builds of torch choose other kernels,
# which add in another order. With AVX2 or no vector instructions in place of AVX-512 the logits
# were at most 2e-6 off.
TOLERANCE = 1e-5
LOADERS = {"petl.load": petl.load, "PeftModel.from_pretrained": PeftModel.from_pretrained}
# loaded for inference, IncreLoRA keeps its live components only; the names are the same
CUT = {"increlora-growing"}


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Recorded inputs; recorded tensors, of which `base_logits` are those without the adapter."""
    tensors = load_file(ADAPTERS / name / "expected.safetensors")
    inputs = {k.removeprefix("inputs."): v for k, v in tensors.items() if k.startswith("inputs.")}
    return inputs, tensors


def assert_same_logits(found: Tensor, expected: Tensor, what: str) -> None:
    gap = float((found - expected).abs().max() / expected.abs().max())
    assert gap <= TOLERANCE, f"{what}: logits differ by {gap:.1e} of the largest"


def test_every_case_has_its_folder():
    assert set(NAMES) == set(compatibility_cases.SAVED)


def test_every_method_of_petl_has_saved_adapters():
    own = {name for name in compatibility_cases.METHODS if petl.method(name).by == "petl"}
    assert own <= {compatibility_cases.ADAPTERS[name].method for name in NAMES}


@pytest.mark.parametrize("name", sorted(compatibility_cases.BASES))
def test_base_models_give_the_recorded_logits(name):
    """If this fails, transformers has changed, and failures of the other tests are due to that."""
    adapter = next(adapter for adapter, other in sorted(BASES.items()) if other == name)
    inputs, expected = read(adapter)
    assert_same_logits(logits(base(name), inputs), expected["base_logits"], name)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_gives_the_recorded_logits(name, loader):
    inputs, expected = read(name)
    model = LOADERS[loader](base(BASES[name]), ADAPTERS / name)
    assert_same_logits(logits(model, inputs), expected["logits"], name)
    if model.peft_config["default"].peft_type == "LORA":
        petl.fuse_lora(model)
        assert_same_logits(logits(model, inputs), expected["logits"], f"{name} after fuse_lora")


@pytest.mark.cells(8)
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_adapter_is_saved_under_the_same_tensor_names(name):
    """With bit-exact tensors: saving a loaded adapter changes nothing."""
    saved = load_file(ADAPTERS / name / "adapter_model.safetensors")
    model: Any = petl.load(base(BASES[name]), ADAPTERS / name, adapter_name="other")
    state = get_peft_model_state_dict(model, adapter_name="other", save_embedding_layers=False)
    assert set(state) == set(saved)
    if name not in CUT:
        for key, tensor in saved.items():
            assert torch.equal(state[key], tensor), key
            assert state[key].dtype == tensor.dtype, key


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_saved_config_is_read(name, tmp_path):
    """PEFT only warns of a field that it does not know, and drops it; values stay the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        PeftConfig.from_pretrained(str(ADAPTERS / name)).save_pretrained(str(tmp_path))
    saved, again = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (ADAPTERS / name, tmp_path)
    )
    # of a method of petl, the package that knows it follows
    assert again["peft_type"].split()[0] == saved["peft_type"].split()[0]
    for key in (saved.keys() & again.keys()) - {"peft_version", "peft_type"}:
        assert in_order(again[key]) == in_order(saved[key]), key


def in_order(value: Any) -> Any:
    """`value`; sorted if it is a list of names, which PEFT may hold as a set."""
    is_names = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return sorted(value) if is_names else value
