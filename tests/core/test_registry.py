"""The registry of methods: names, fields, refusals, and the result of `wrap`."""

import logging
import warnings

import peft
import pytest
import torch
from contract_cases import adaptable
from peft.utils import PeftType
from torch import nn

import petl
from petl import testing
from petl.core import compat
from petl.core.losses import extra_losses
from petl.core.registry import method_of, needs_calibration


def test_methods_are_listed_in_order_with_their_summaries():
    names = petl.list_methods()
    assert names == sorted(names)
    assert {"lora", "mola", "adalora", "ia3", "vera", "dora"} <= set(names)
    for name in names:
        entry = petl.method(name)
        assert entry.name == name
        assert entry.summary
        assert entry.paper
        assert issubclass(petl.get(name), peft.PeftConfig)
        assert entry.config_cls is petl.get(name)


def test_an_unknown_method_is_a_key_error_too():
    with pytest.raises(KeyError, match="zzzzzz"):
        petl.method("zzzzzz")


@pytest.mark.parametrize("name", petl.list_methods())
def test_an_unknown_field_is_an_error_that_names_the_method(name):
    with pytest.raises(petl.InputError, match=f"'{name}' .*'target_module'"):
        petl.build_config(name, target_module=["q_proj"])


def test_an_entry_sets_its_defaults_and_a_field_may_override_them():
    config = petl.build_config("dora", r=4)
    assert (config.use_dora, config.r) == (True, 4)
    assert petl.build_config("rslora").use_rslora
    assert not petl.build_config("dora", use_dora=False).use_dora


@pytest.mark.parametrize("name", ["lora", "dora", "rslora", "mola", "ia3"])
def test_the_method_of_a_config_is_the_most_specific_one(name):
    assert method_of(petl.build_config(name)).name == name


def test_the_method_of_a_foreign_config_is_none():
    assert method_of(peft.PromptTuningConfig(num_virtual_tokens=3)) is None


def test_wrap_returns_a_peft_model_of_the_task():
    base = testing.tiny_llama()
    model = petl.wrap(base, "mola", adapter_name="mine", task_type="CAUSAL_LM")
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert type(model).__name__ == "PeftModelForCausalLM"  # pipelines of transformers look at it
    assert list(model.peft_config) == ["mine"]
    assert model.get_base_model() is base
    assert type(petl.wrap(testing.tiny_llama(), "mola")).__name__ == "PeftModel"


def test_get_peft_model_works_without_wrap():
    config = petl.get("mola")(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(testing.tiny_llama(), config)
    assert len(testing.tuner_layers(model)) == 3


@pytest.mark.parametrize("start", ["eva", "lora_ga"])
def test_a_start_from_data_needs_calibration(start):
    assert needs_calibration(petl.build_config("lora", init_lora_weights=start))


@pytest.mark.parametrize(
    ("register", "taken"),
    [
        (lambda: petl.adopt("lora", peft.LoraConfig, summary="", paper=""), "'lora'"),
        (lambda: petl.register(type(petl.method("mos"))), "'mos'"),
        (
            lambda: compat.add_method("petl_other", "lora_", peft.LoraConfig, peft.LoraModel),
            "'lora_'",
        ),
        (lambda: compat.extend_peft_types("LORA"), "LORA"),
    ],
)
def test_a_name_a_prefix_and_a_type_are_of_one_method(register, taken):
    with pytest.raises(ValueError, match=taken):
        register()
    assert "PETL_OTHER" not in PeftType.__members__


def test_wrapping_freezes_the_base_weights_unchanged():
    base = testing.tiny_bert()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = petl.wrap(base, "mola")
    plain = model.unload()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("name", ["lora", "mola", "boft"])
def test_wrapping_and_loading_give_no_warnings(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = petl.wrap(testing.tiny_llama(), name, target_modules=["q_proj"])
        model.save_pretrained(tmp_path)
        petl.load(testing.tiny_llama(), tmp_path)


def test_values_that_peft_accepts_against_its_annotation_are_accepted():
    assert petl.build_config("lora", lora_alpha=0.5).lora_alpha == 0.5
    assert petl.build_config("oft", r=0, oft_block_size=4).r == 0


@pytest.mark.parametrize("name", ["lora", "mola"])
def test_names_of_heads_may_be_more_than_the_model_has(name):
    kept = petl.wrap(testing.tiny_llama(), name, modules_to_save=["lm_head", "classifier", "score"])
    assert any("lm_head" in key for key, p in kept.named_parameters() if p.requires_grad)


# A config in place of a name


def same_adapter(first: nn.Module, second: nn.Module) -> bool:
    parts = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (first, second)]
    return parts[0].keys() == parts[1].keys() and all(
        torch.equal(parts[0][name], parts[1][name]) for name in parts[0]
    )


def seeded(*given: object, **fields: object) -> peft.PeftModel:
    base = testing.tiny_llama()
    torch.manual_seed(3)
    return petl.wrap(base, *given, **fields)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mola", {"r": 2, "num_experts": 3}),
        ("lora", {"r": 4, "target_modules": ["q_proj"]}),
        ("dora", {"r": 4, "target_modules": ["q_proj"]}),
        ("ia3", {}),
        ("adapter", {"r": 4}),
    ],
)
def test_a_config_in_place_of_a_name_gives_the_same_adapter(name, fields):
    entry = petl.method(name)
    config = entry.config_cls(**{**entry.defaults, **fields})
    assert same_adapter(seeded(config), seeded(name, **fields))


def test_a_config_of_a_method_over_another_is_one_of_its_own_class():
    config = petl.build_config("binary", inner="lora", r=4, target_modules=["q_proj"])
    wrapped = seeded(config)
    assert same_adapter(wrapped, seeded("binary", inner="lora", r=4, target_modules=["q_proj"]))


def test_one_config_serves_several_models_and_is_left_as_it_was():
    config = petl.get("lora")(r=4, target_modules="all-linear")
    before = config.to_dict()
    first, second = seeded(config, adapter_name="mine"), seeded(config)
    assert config.to_dict() == before
    assert first.peft_config["mine"] is not second.peft_config["default"]


def test_a_config_of_a_loss_is_wrapped_with_its_method():
    config = petl.get("density")(method="lora", method_config={"target_modules": ["q_proj"]})
    assert extra_losses(seeded(config))


OWN = [n for n in adaptable("llama") if petl.method(n).own and n != "binary"]


@pytest.mark.cells(3)
@pytest.mark.parametrize("name", OWN)
def test_no_targets_means_the_default_ones(name):
    mos = {"r": 4, "equivalent_rank": 2, "private_rank": 1}
    icv = {"train": True, "pairs": None, "scale": "plain", "keep_norm": False}
    fields = {"icv": icv, "mos": mos, "polyhistor": {"tasks": ["only"]}}.get(name, {})
    chosen = [
        petl.wrap(testing.tiny_llama(), name, **fields, **targets).active_peft_config.target_modules
        for targets in ({}, {"target_modules": None})
    ]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("name", "fields", "here", "there"),
    [
        ("lora", {}, "lora_alpha=8", "lora_alpha=16"),
        ("lora", {}, "target_modules=None", "target_modules=block-linear"),
        ("binary", {"inner": "lora"}, "lora_alpha=8", "lora_alpha=16"),
        ("binary", {}, "save_format=packed", "save_format=stacked"),
        ("increlora", {}, "deltaT=100", "deltaT=None"),
        ("density", {}, "lora_alpha=8", "lora_alpha=16"),  # its method is lora
    ],
)
def test_defaults_that_differ_from_those_of_train_py_are_logged(name, fields, here, there, caplog):
    with caplog.at_level(logging.INFO, logger="petl.core.method"):
        petl.wrap(testing.tiny_llama(), name, **fields)
    (record,) = caplog.records
    ours, _, theirs = record.getMessage().partition("; train.py has ")
    assert here in ours
    assert there in theirs


def test_given_values_and_equal_defaults_are_not_logged(caplog):
    fields = {"lora_alpha": 8, "target_modules": ["q_proj"]}
    with caplog.at_level(logging.INFO, logger="petl.core.method"):
        petl.wrap(testing.tiny_llama(), "lora", **fields)
        petl.wrap(testing.tiny_llama(), "mola")
    assert not caplog.records
