"""Configs of adapters that strangers have made."""

import json

import pytest

import petl
from petl import testing


@pytest.mark.parametrize("ranges", [[[0, 3]] * 400, [[0, 3]] * 400 + [[2000, 0]], [[0, 10**9]]])
def test_a_config_that_repeats_blocks_thousands_of_times_is_refused(ranges, tmp_path):
    petl.wrap(testing.tiny_llama(), "lora", target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": ranges}))
    with pytest.raises(petl.InputError, match=r"layer_replication .* list at most 1,000"):
        petl.load(testing.tiny_llama(), tmp_path)
