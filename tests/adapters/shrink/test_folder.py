"""Folders of shrunk models: the class loads equal widths, `petl.load_shrunk` all."""

import copy
import json
import pickle
import subprocess

import pytest
import torch
import warm_python
from safetensors.torch import load_file, save_file
from shrink_fixtures import batches, dense
from transformers import AutoConfig

import petl
from petl import testing
from petl.core.model.layer_widths import FILE as WIDTHS
from petl.errors import InputError

SETTINGS = {"sparsity": 0.4, "multiple": 4}
FRESH = """
import sys
from safetensors.torch import load_file, save_file
import transformers
cls, folder, inputs, out, ours = sys.argv[1:]
if ours == "petl":
    import petl
    model = petl.load_shrunk(folder)
else:
    model = getattr(transformers, cls).from_pretrained(folder)
assert (ours == "petl") == ("petl" in sys.modules)
assert type(model).__name__ == cls
save_file({"logits": model(**load_file(inputs)).logits.detach().contiguous()}, out)
"""


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "widths", "heads"),
    [("llama", "even", True), ("gpt2", "even", False), ("llama", "by_block", True)],
)
def test_a_fresh_process_computes_the_same(name, widths, heads, tmp_path):
    model = dense(name)
    given = batches(model)
    small = petl.shrink(model, given, widths=widths, heads=heads, sparsity=0.5).model
    saved(small, tmp_path / "small")
    assert (tmp_path / "small" / WIDTHS).exists() == (widths == "by_block")
    save_file(given[0], tmp_path / "in")
    (tmp_path / "fresh.py").write_text(FRESH)
    words = [type(small).__name__, "small", "in", "out", "petl" if widths == "by_block" else "no"]
    line = [warm_python.python(), "fresh.py", *words]
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True)
    found = load_file(tmp_path / "out")["logits"]
    assert torch.equal(found, testing.logits(small, given[0]))


@pytest.mark.parametrize("widths", ["even", "by_block"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart", "phi3", "bloom"])
def test_a_folder_loads_with_the_same_weights(name, widths, tmp_path):
    widths = "by_block" if name == "bloom" else widths
    model = dense(name).to(torch.bfloat16)
    small = petl.shrink(model, batches(model), widths=widths, **SETTINGS).model
    loaded = petl.load_shrunk(saved(small, tmp_path))
    assert type(loaded) is type(small)
    assert not loaded.training
    state = small.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    again = petl.shrink(loaded, batches(loaded), sparsity=0.3, multiple=4, widths="by_block")
    assert again.parameters[1] < again.parameters[0]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "names no layers"),
        ({"model.layers.0.mlp.gate": [64, 48]}, "which the model lacks"),
        ({"model.norm": [64, 64]}, "is LlamaRMSNorm and no linear layer"),
        ({"model.layers.0.mlp.up_proj": [64, 9999]}, r"9999 outputs, more than \[64, 96\]"),
        ({"model.layers.0.mlp.up_proj": [64, 0]}, "two numbers from 1"),
        ({"model.layers.0.mlp.up_proj": [64]}, "two numbers from 1"),
        ({"model.layers.0.mlp.up_proj": "wide"}, "cannot be used"),
        ({"model.layers.0.mlp.up_proj": [64, 40]}, "does not fit LlamaForCausalLM"),
    ],
)
def test_widths_that_do_not_fit_are_refused(layers, message, tmp_path):
    model = dense("llama")
    small = petl.shrink(model, batches(model), widths="by_block", **SETTINGS).model
    saved(small, tmp_path)
    (tmp_path / WIDTHS).write_text(json.dumps({"layers": layers}))
    with pytest.raises(InputError, match=message):
        petl.load_shrunk(tmp_path)


def same_model(folder, model):
    """Whether `petl.load_shrunk` finds a model's weights in a folder."""
    state = petl.load_shrunk(folder).state_dict()
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_copies_pickles_and_loaded_models_save_their_widths(tmp_path):
    model = dense("llama")
    small = petl.shrink(model, batches(model), widths="by_block", **SETTINGS).model
    merged = petl.wrap(copy.deepcopy(small), "lora", target_modules=["down_proj"]).unload()
    loaded = petl.load_shrunk(saved(small, tmp_path / "first"))
    others = [copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded, merged]
    assert [same_model(saved(each, tmp_path / "other"), small) for each in others] == [True] * 4


def test_equal_widths_leave_no_file_of_another_model(tmp_path):
    model = dense("llama")
    for widths in ("by_block", "even"):
        small = petl.shrink(model, batches(model), widths=widths, **SETTINGS).model
        assert same_model(saved(small, tmp_path), small)
    assert not (tmp_path / WIDTHS).exists()


def test_weights_without_their_widths_are_refused_with_what_is_missing(tmp_path):
    model = dense("llama")
    small = petl.shrink(model, batches(model), widths="by_block", **SETTINGS).model
    (saved(small, tmp_path) / WIDTHS).unlink()
    with pytest.raises(InputError, match=r"widths\.json"):
        petl.load_shrunk(tmp_path)


@pytest.mark.parametrize("folder", ["nope", None, 3])
def test_what_is_no_folder_is_refused_without_asking_the_hub(folder, monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_: pytest.fail("asks for it"))
    with pytest.raises(InputError, match=f"folder={folder}"):
        petl.load_shrunk(folder)
