"""Folders of adapters, plain or compressed, and repositories of the Hub."""

import pytest
from huggingface_hub import constants

import petl
from petl import testing

CASE = testing.Case("mola", "llama")


GIVEN = [{"low_cpu_mem_usage": True}, {"torch_device": "cpu"}, {"autocast_adapter_dtype": False}]


@pytest.mark.parametrize("given", GIVEN)
def test_an_adapter_of_the_hub_is_loaded_with_arguments_of_peft(given, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    home, commit = tmp_path / "models--someone--adapter", "0" * 40
    model, batch = CASE.wrap_stirred(), CASE.batch()
    model.save_pretrained(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    loaded = petl.load(CASE.base(), "someone/adapter", **given)
    assert testing.difference(testing.logits(loaded, batch), testing.logits(model, batch)) < 1e-6
