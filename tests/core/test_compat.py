"""Adapters on an output head: their files hold no weight of the base, whoever reads them."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import petl
from petl.core.adapter_file import WEIGHTS
from petl.testing import tiny_llama
from petl.testing.case import assert_close, logits, stir
from petl.testing.models import causal_batch
from petl.training.runs.checkpoint import save_adapter

TARGETS = ["q_proj", "lm_head"]
METHODS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "binary": {"inner": "lora"},
    "corda": {"r": 4, "calibration": [causal_batch(2, seed=3)]},
    "increlora": {},
    "sparse": {},
}


def check_reloads(name: str, save: Callable[[PeftModel, Any], object], folder: Any) -> None:
    """Wrap with method `name`, save, and load onto a copy of the base in two ways."""
    base = tiny_llama(2)
    model = stir(petl.wrap(copy.deepcopy(base), name, target_modules=TARGETS, **METHODS[name]))
    save(model, folder)
    kept = [key for key in load_file(folder / WEIGHTS) if "base_layer" in key]
    assert not kept
    batch = causal_batch(2, seed=0)
    for load in (petl.load, PeftModel.from_pretrained):
        loaded = load(copy.deepcopy(base), folder)
        assert_close(logits(loaded, batch), logits(model, batch), 1e-5, f"logits, by {load}")


@pytest.mark.cells(2)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("embeddings", [True, "auto", False])
@pytest.mark.parametrize("name", METHODS)
def test_an_adapted_head_is_saved_without_its_base_weight(name, embeddings, tmp_path):
    def save(model: PeftModel, folder: Any) -> None:
        model.save_pretrained(folder, save_embedding_layers=embeddings)

    check_reloads(name, save, tmp_path)


@pytest.mark.parametrize("name", ["corda", "sparse"])
def test_the_adapter_of_a_run_or_checkpoint_loads_strictly(name, tmp_path):
    check_reloads(name, save_adapter, tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("embeddings", [True, "auto", False])
def test_files_of_peft_load_with_and_without_base_weights(embeddings, tmp_path):
    base = tiny_llama(2)
    model = stir(petl.wrap(copy.deepcopy(base), "lora", target_modules=TARGETS))
    model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    batch = causal_batch(2, seed=0)
    loaded = petl.load(base, tmp_path)
    assert_close(logits(loaded, batch), logits(model, batch), 0, "logits of the loaded adapter")


def test_embeddings_that_are_not_adapted_are_saved_on_request(tmp_path):
    """As PEFT does for a vocabulary that was extended; `petl.load` takes such a file."""
    base: Any = tiny_llama(2)
    base.resize_token_embeddings(base.config.vocab_size + 3)
    model = stir(petl.wrap(copy.deepcopy(base), "mola"))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    fresh: Any = tiny_llama(2)
    fresh.resize_token_embeddings(base.config.vocab_size)
    batch = {
        name: tensor * 0 + base.config.vocab_size - 1 for name, tensor in causal_batch(1, 0).items()
    }
    batch["attention_mask"] = batch["attention_mask"] * 0 + 1
    loaded = petl.load(fresh, tmp_path)
    assert_close(logits(loaded, batch), logits(model, batch), 1e-6, "logits of the new tokens")


def test_oft_on_a_linear_layer_takes_inputs_of_any_number_of_dimensions():
    """PEFT takes four dimensions for an image."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 16))
    model = peft.get_peft_model(base, peft.OFTConfig(target_modules=["0"], r=0, oft_block_size=8))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 5, 32)
    with torch.no_grad():
        expected = model(x.view(30, 32)).view(2, 3, 5, 16)
        torch.testing.assert_close(model(x), expected)
        assert (expected - model.base_model.model[0].base_layer(x)).abs().max() > 0.01
