"""Every registered method keeps the promises of a PEFT tuner; see `petl.testing`."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import standin
from omegaconf import OmegaConf

import petl
from petl import testing
from petl.testing import Case

METHOD_CONFIGS = Path(__file__).parents[1] / "configs" / "method"
OWN = [name for name in petl.list_methods() if petl.method(name).own]
ADOPTED = [name for name in petl.list_methods() if not petl.method(name).own]

# What a method does not promise or must be told, and the rates that suit those with few parameters.
ONE_TRAINED = "AdaLoRA trains one adapter at a time"
A_LORA_LATER = "what is saved is the LoRA that a CorDA adapter becomes"
RESIDUAL = "without its adapter, CorDA's base is the residual weights"
PECULIAR = {
    "adalora": {
        "fields": {"total_step": 200},
        "excused": {
            "switching_changes_outputs_and_what_trains": ONE_TRAINED,
            "adapters_do_not_disturb_each_other": ONE_TRAINED,
            "deleted_adapters_leave_no_tensor": ONE_TRAINED,
            "reloads_in_a_fresh_process": "loaded for inference, PEFT's AdaLoRA takes no labels",
        },
    },
    "adapter": {"fields": {"r": 8}, "lr": 4e-2},
    "binary": {
        "fields": {"r": 4, "bneck_dropout": 0.0, "save_format": "latent"},
        "refuses": ("layer_compiles_whole", "both_adapters_can_be_active"),  # a layer by itself
        "lr": 3e-2,
    },
    "c3a": {"lr": 3e-2, "starts_at_base": False},
    "compacter": {"fields": {"r": 8}, "lr": 0.1},
    "corda": {
        "fields": {"r": 4, "lora_alpha": 4},
        "refuses": (
            "switching_changes_outputs_and_what_trains",
            "adapters_do_not_disturb_each_other",
            "deleted_adapters_leave_no_tensor",
        ),
        "excused": {
            "config_survives_its_file": A_LORA_LATER,
            "resumed_training_equals_a_straight_run": A_LORA_LATER,
            "disabled_adapters_give_the_base_model": RESIDUAL,
            "merging_and_unmerging_change_nothing": RESIDUAL,
            "unloading_gives_the_plain_model": "the pretrained weights come back, but for rounding",
        },
    },
    "fourierft": {"starts_at_base": False},
    "ia3": {"lr": 0.1},
    "ln_tuning": {"lr": 3e-2},
    "mos": {"fields": {"r": 3, "equivalent_rank": 3}},
    "sparse": {"fields": {"total_step": 100}},  # of the run; train.py fills it in
    "vblora": {"starts_at_base": False},
}


def adopted(name: str, model: str) -> Case:
    """A case of a PEFT method, with the fields of its YAML."""
    fields = OmegaConf.to_container(OmegaConf.load(METHOD_CONFIGS / f"{name}.yaml"))
    assert isinstance(fields, dict)
    del fields["name"]
    peculiar = dict(PECULIAR.get(name, {}))
    fields |= peculiar.pop("fields", {})
    return Case(name, model, fields, **peculiar)


LOST = "a packed file has no latent weights, so that three steps change no code"
PACKED = {
    "tensor_names_follow_the_rule": "a packed file has codes and stats in a weight's place",
    "half_precision_base_keeps_a_float32_adapter": LOST,
    "half_precision_adapter_works_too": LOST,
}


def own(name: str, model: str, **options) -> Case:
    """A case of a method of petl."""
    return Case(name, model, **{**PECULIAR.get(name, {}), **options})


def binary_over(inner: str, **fields) -> Case:
    """A case of quantised weights over another method, saved in few bits."""
    fields = {"inner": inner, **fields}
    return Case("binary", "llama", fields, excused=PACKED, lr=3e-2, name=f"binary-{inner}")


OWN_CASES = [own(name, model) for name in OWN for model in testing.TINY_MODELS]
OWN_CASES += [
    binary_over("lora", r=4, target_modules="block-linear"),
    binary_over("mos", r=3, equivalent_rank=3),
    binary_over("mola", num_experts=2),
]
ADOPTED_CASES = [adopted(name, "llama") for name in ADOPTED]


def params(cases: list[Case]) -> list:
    """One test for each case and each check that applies to it."""
    return [
        pytest.param(case, check, id=f"{case}-{check}", marks=marks(case, check))
        for case in cases
        for check in testing.checks(case)
    ]


def marks(case: Case, check: str) -> list[pytest.MarkDecorator]:
    entry = testing.CHECKS[check]
    slow = entry.slow or (check == "two_processes_equal_one" and not case.promises.own)
    lacking = bool(entry.package) and find_spec(entry.package) is None
    extra = "deepspeed" if entry.package == "deepspeed" else "quantised"
    skip = pytest.mark.skipif(lacking, reason=f"pip install -e '.[{extra}]'")
    return [*([pytest.mark.slow] if slow else []), *([skip] if entry.package else [])]


@pytest.mark.parametrize(("case", "check"), params(OWN_CASES))
def test_own_method_keeps_its_promise(case, check, device):
    hold(case, check, device)


@pytest.mark.parametrize(("case", "check"), params(ADOPTED_CASES))
def test_adopted_method_keeps_its_promise(case, check, device):
    hold(case, check, device)


def hold(case: Case, check: str, device: str) -> None:
    """Run a check on a device; what has processes of its own is of the CPU."""
    if device != "cpu" and "process" in check:
        pytest.skip("its processes know no other device than the CPU")
    lacks = [standin.LACKING[name] for name in (case.method, check) if name in standin.LACKING]
    if device == standin.NAME and lacks:
        pytest.skip(f"the device has no {lacks[0]}")
    testing.run(check, replace(case, device=device))
