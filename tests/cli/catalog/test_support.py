"""The table of supported features equals the code, and a check covers each cell."""

from pathlib import Path

import pytest
from contract_cases import ADOPTED, adopted, models_of, own

import petl
from petl import testing
from petl.cli.catalog.method_page import page_of
from petl.cli.catalog.support import MEANINGS, PAGE, default_config, page, row
from petl.core.registry import refusal
from petl.core.spec.capabilities import CAPABILITIES, capability_of

ROOT = Path(__file__).parents[3]


def case_of(name: str) -> testing.Case:
    models = models_of(name)
    model = "llama" if "llama" in models else models[0]
    return adopted(name, model) if name in ADOPTED else own(name, model)


def test_the_committed_table_equals_the_code():
    assert (ROOT / PAGE).read_text() == page(), "run: python scripts/support.py"


def test_every_capability_is_explained_and_has_checks():
    assert list(MEANINGS) == list(CAPABILITIES)
    for name, capability in CAPABILITIES.items():
        assert all(capability_of(check) == name for check in capability.checks)
        assert set(capability.checks) <= set(testing.CHECKS)


@pytest.mark.parametrize("name", petl.list_methods())
def test_a_check_covers_every_cell(name):
    case, found = case_of(name), row(name)
    runs = set(testing.checks(case))
    for capability, reason in found.items():
        by_command = capability == "lora" and (case.prefix == "lora_" or name in ADOPTED)
        assert runs & set(CAPABILITIES[capability].checks) or by_command, capability
        if capability not in ("merge", "lora"):
            assert refusal(case.config(), capability) == reason


@pytest.mark.parametrize("name", petl.list_methods())
def test_limits_refer_to_known_capabilities(name):
    assert set(petl.method(name).unsupported) <= set(CAPABILITIES)


def test_limits_follow_the_fields():
    for capability in ("4bit", "fsdp"):
        assert refusal(petl.build_config("lora", init_lora_weights="pissa"), capability)
        assert not refusal(default_config("lora"), capability)
    inner = petl.build_config("binary", inner="loha", target_modules="all-linear")
    assert refusal(inner, "4bit") == row("loha")["4bit"]


def test_a_page_of_a_method_has_its_row():
    facts = "\n".join(page_of("dora").facts)
    assert (
        "supports: DDP, FSDP2, DeepSpeed, 4-bit base, torchao base, gradient checkpointing" in facts
    )
    assert "mixed batch: not supported (PEFT's DoRA does not support adapter_names" in facts


def test_a_method_without_mixed_batches_refuses_them_wrapped_or_loaded(tmp_path):
    case = adopted("ia3", "llama")
    model = case.wrap()
    model.save_pretrained(tmp_path)
    for adapted in (model, petl.load(case.base(), tmp_path)):
        with pytest.raises(petl.InputError, match="adapter_names is not possible: PEFT ignores"):
            testing.logits(adapted, case.batch(), adapter_names=["default"] * 4)
        testing.logits(adapted, case.batch())
