"""A fine-tuned model is pruned against its base; excluded tensors stay those of the tuned one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import petl
from petl.adapters import deltas
from petl.adapters.deltas.full_model import prune_model

FILE = "model.safetensors"


def folder_of(path, state):
    path.mkdir()
    save_file(state, path / FILE)
    return path


def test_excluded_tensors_stay_those_of_the_tuned_model(tmp_path):
    start = {"body": torch.randn(8, 4), "head": torch.randn(2, 4)}
    state = {"body": start["body"] + torch.randn(8, 4), "head": torch.randn(5, 4)}
    state |= {"extra": torch.randn(3), "ids": torch.arange(4)}
    base = folder_of(tmp_path / "base", {name: t.bfloat16() for name, t in start.items()})
    tuned = folder_of(tmp_path / "tuned", state)
    with pytest.raises(petl.InputError, match="extra"):
        prune_model(tuned, base, tmp_path / "out", 0.5, exclude=["ids"])
    kept, changed = prune_model(
        tuned, base, tmp_path / "out", 0.5, exclude=["head", "extra", "ids"]
    )
    assert 0 < kept < changed == 32
    found = load_file(tmp_path / "out" / FILE)
    assert all(torch.equal(found[name], state[name]) for name in ("head", "extra", "ids"))
    body = {"body": start["body"].bfloat16()}
    delta = deltas.prune(deltas.extract({"body": state["body"]}, body), 0.5)
    assert torch.equal(found["body"], deltas.apply(body, delta)["body"])
