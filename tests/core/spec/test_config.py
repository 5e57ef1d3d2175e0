"""What all configs share: normalized fields, refusals, equal files for equal configs."""

import dataclasses
import json

import peft
import pytest

import petl

OWN = [name for name in petl.list_methods() if petl.method(name).own]
IDLE = [  # the first field does nothing beside the others
    ("mola", {"router_layers": 3}, "router_type=pregated"),
    ("mola", {"router_hidden_size": 64}, "router_type one of recurrent, pregated"),
    ("adapter", {"reduction_factor": 4, "r": 4}, "r=null"),
    ("adapter", {"conv_kernel_size": 3}, "block=conformer"),
    ("adapter", {"identity_gate": False}, "gate one of large, middle_x, small"),
    ("adapter", {"gate_rank": 3, "gate": "small"}, "gate=large"),
    ("compacter", {"phm_dim": 8, "projection": "lowrank"}, "projection=phm"),
    ("compacter", {"phm_rank": 2, "factorized_phm": False}, "factorized_phm=true"),
    ("dsee", {"prune_mode": "weight"}, "target_prune_ratio above 0"),
    ("increlora", {"warmup_steps": 5, "restart_warmup": False}, "restart_warmup=true"),
    ("pela", {"compression": 3.0, "r": 4}, "r=null"),
    ("polyhistor", {"zero_init_norm": True, "post_norm": False}, "post_norm=true"),
    ("pyra", {"vector_lr": 0.1, "reactivate": False}, "reactivate=true"),
    ("sherl", {"reduction_factor": 4, "r": 4}, "r=null"),
    ("sparse", {"density": 0.05, "r": 4}, "r and num_tunable_weights null"),
    ("sparse", {"reselection_steps": 9, "selection_algorithm": "none"}, "one of rigl, sm3"),
    ("vl_pet", {"gate_rank": 3, "gate": "none"}, "gate=large"),
    ("binary", {"router_layers": 3, "inner": "mola"}, "router_type=pregated"),
    ("lora", {"lora_ga_config": {}}, "init_lora_weights=lora_ga"),
    ("lora", {"qalora_group_size": 4}, "use_qalora=true"),
    ("miss", {"mini_r": 4}, "init_weights=mini"),
]


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


@pytest.mark.parametrize(("name", "fields", "words"), IDLE)
def test_a_field_that_does_nothing_beside_the_others_is_refused(name, fields, words):
    field = next(iter(fields))
    with pytest.raises(petl.InputError, match=f"{field}=.* has no effect: it acts with .*{words}"):
        petl.build_config(name, **fields)


def test_a_loss_refuses_a_field_that_does_nothing():
    with pytest.raises(petl.InputError, match=r"temperature=2.0 has no effect: .* logits=kl"):
        petl.wrap(petl.testing.tiny_llama(), "distill", temperature=2.0)


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
