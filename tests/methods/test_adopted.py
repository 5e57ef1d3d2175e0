"""PEFT's own tuners, which train with a YAML file and no code."""

from itertools import cycle
from pathlib import Path

import peft
import pytest
import torch
from omegaconf import OmegaConf
from peft import get_peft_model

import petl
from petl import testing

CONFIGS = Path(__file__).parents[2] / "configs" / "method"
ADOPTED = [name for name in petl.list_methods() if petl.method(name).by == "PEFT"]


@pytest.mark.parametrize("name", ADOPTED)
def test_the_config_is_pefts_own(name):
    assert petl.get(name).__module__.startswith("peft.")
    assert issubclass(petl.get(name), peft.PeftConfig)


@pytest.mark.cells(7)
@pytest.mark.parametrize("name", ADOPTED)
def test_a_wrapped_model_equals_pefts(name):
    """Tensors are bit-exact those of `get_peft_model`, once presets are resolved.

    `exports_lora` equals the answer of PEFT's layers.
    """
    fields = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    del fields["name"]
    if "total_step" in fields:
        fields["total_step"] = 200
    torch.manual_seed(1)
    ours = petl.wrap(testing.tiny_llama(), name, **fields)
    fields["target_modules"] = ours.active_peft_config.target_modules
    torch.manual_seed(1)
    config = petl.get(name)(**{**petl.method(name).defaults, **fields})
    theirs = get_peft_model(testing.tiny_llama(), config)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert not [key for key in state if not torch.equal(state[key], expected[key])]
    assert set(testing.trainable(ours)) == set(testing.trainable(theirs))
    layers = testing.tuner_layers(ours).values()
    supported = all(layer.supports_lora_conversion("default") for layer in layers)
    assert petl.method(name).exports_lora == supported


@pytest.mark.cells(7)
@pytest.mark.parametrize(("name", "load"), zip(ADOPTED, cycle([False, True]), strict=False))
def test_the_same_trains_on_a_base_in_half_precision(name, load, tmp_path):
    """PEFT leaves AdaLoRA's rank counters trainable there, and on every device but the CPU."""
    fields = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    del fields["name"]
    if "total_step" in fields:
        fields["total_step"] = 200
    full = petl.wrap(testing.tiny_llama(), name, **fields)
    base = testing.tiny_llama().bfloat16()
    if load:
        full.save_pretrained(tmp_path)
        half = petl.load(base, tmp_path, is_trainable=True)
    else:
        half = petl.wrap(base, name, **fields)
    assert set(testing.trainable(half)) == set(testing.trainable(full))


def test_useful_tuners_of_peft_are_registered():
    assert {"adalora", "ia3", "vera", "dora", "loha", "lokr", "oft", "shira"} <= set(ADOPTED)
