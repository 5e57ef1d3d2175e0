"""Every registered method keeps the promises of a PEFT tuner; see `petl.testing`."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import petl
from petl import testing
from petl.testing import Case

METHOD_CONFIGS = Path(__file__).parents[1] / "configs" / "method"
OWN = [name for name in petl.list_methods() if petl.method(name).own]
ADOPTED = [name for name in petl.list_methods() if not petl.method(name).own]

# What PEFT's own tuners do not promise, and what suits methods that are small on tiny models.
ONE_TRAINED = "AdaLoRA trains one adapter at a time"
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
    "c3a": {"lr": 3e-2, "starts_at_base": False},
    "compacter": {"fields": {"r": 8}, "lr": 0.1},
    "fourierft": {"starts_at_base": False},
    "ia3": {"lr": 0.1},
    "ln_tuning": {"lr": 3e-2},
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


OWN_CASES = [
    Case(name, model, **PECULIAR.get(name, {})) for name in OWN for model in testing.TINY_MODELS
]
ADOPTED_CASES = [adopted(name, "llama") for name in ADOPTED]


def params(cases: list[Case]) -> list:
    """One test for each case and each check that applies to it."""
    return [
        pytest.param(case, check, id=f"{case}-{check}", marks=[pytest.mark.slow] if slow else [])
        for case in cases
        for slow in (False, True)
        for check in testing.checks(case, slow=slow)
    ]


@pytest.mark.parametrize(("case", "check"), params(OWN_CASES))
def test_own_method_keeps_its_promise(case, check):
    testing.run(check, case)


@pytest.mark.parametrize(("case", "check"), params(ADOPTED_CASES))
def test_adopted_method_keeps_its_promise(case, check):
    testing.run(check, case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("case", "check"), params([Case(n, device="cuda") for n in OWN]))
def test_own_method_keeps_its_promise_on_a_gpu(case, check):
    testing.run(check, case)
