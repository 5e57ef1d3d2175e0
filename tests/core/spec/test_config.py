"""What all configs share: normalized fields, refusals, equal files for equal configs."""

import dataclasses
import json

import peft
import pytest

import petl

OWN = [name for name in petl.list_methods() if petl.method(name).own]


def test_lists_of_targets_become_sets():
    config = petl.build_config("mola", target_modules=["v", "q"], exclude_modules=("k",))
    assert config.target_modules == {"q", "v"}
    assert config.exclude_modules == {"k"}


def test_tuples_and_ranges_become_lists():
    config = petl.build_config(
        "mola", modules_to_save=("head",), layers_to_transform=range(2), layers_pattern=("h",)
    )
    assert config.modules_to_save == ["head"]
    assert config.layers_to_transform == [0, 1]
    assert config.layers_pattern == ["h"]


def test_values_of_the_methods_file_and_of_saved_adapters_are_not_refused(tmp_path):
    config = petl.build_config("vl_pet", gate="none", identity_gate=True)  # as in its YAML
    config.gate_rank = 3
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).gate_rank == 3


def test_equal_configs_make_equal_files(tmp_path):
    texts = []
    for targets in (["a", "b", "c"], ["c", "a", "b"]):
        petl.build_config("mola", target_modules=targets).save_pretrained(tmp_path)
        texts.append((tmp_path / "adapter_config.json").read_text())
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["target_modules"] == ["a", "b", "c"]
    assert json.loads(texts[0])["peft_type"].startswith("PETL_MOLA ")


@pytest.mark.parametrize("name", OWN)
def test_every_field_has_a_meaning(name):
    """`petl show NAME` prints them."""
    inherited = {field.name for field in dataclasses.fields(petl.get("lora"))}
    for field in dataclasses.fields(petl.get(name)):
        if field.init and field.name not in inherited:
            assert field.metadata.get("help"), f"{name}.{field.name} has no help"
