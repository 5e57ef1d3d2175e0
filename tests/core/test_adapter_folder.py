"""Folders of adapters and repositories of the Hub; configs that strangers have made."""

import json

import pytest
from huggingface_hub import constants

import petl
from petl import testing


@pytest.mark.parametrize("ranges", [[[0, 3]] * 400, [[0, 3]] * 400 + [[2000, 0]], [[0, 10**9]]])
def test_a_config_that_repeats_blocks_thousands_of_times_is_refused(ranges, tmp_path):
    petl.wrap(testing.tiny_llama(), "lora", target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": ranges}))
    with pytest.raises(petl.InputError, match=r"layer_replication .*1,000"):
        petl.load(testing.tiny_llama(), tmp_path)


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
