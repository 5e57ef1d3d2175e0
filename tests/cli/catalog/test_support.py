"""The table of supported features equals the code, and a check covers each cell."""

import json

import pytest
from contract_cases import ADOPTED, adopted, models_of, own
from support import MEANINGS, PAGE, checks_of, index, page

import petl
from petl import testing
from petl.cli.catalog.method_page import page_of
from petl.cli.catalog.support import HEADINGS, default_config, row
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.system.imports.tables import INDEX


def case_of(name: str) -> testing.Case:
    models = models_of(name)
    model = "llama" if "llama" in models else models[0]
    return adopted(name, model) if name in ADOPTED else own(name, model)


def test_the_committed_table_equals_the_code():
    assert PAGE.read_text() == page(), "run: python scripts/support.py"


def test_the_index_of_methods_and_losses_is_that_of_the_code():
    assert json.loads(INDEX.read_text()) == index(), "run: python scripts/support.py"


def test_every_column_is_explained_and_has_checks():
    assert list(MEANINGS) == list(HEADINGS)
    assert all(checks_of(capability) for capability in HEADINGS)


@pytest.mark.parametrize("name", petl.list_methods())
def test_a_check_covers_every_cell(name):
    case, found = case_of(name), row(name)
    runs = set(testing.checks(case))
    for capability, reason in found.items():
        by_command = capability is Capability.LORA_EXPORT and (
            case.prefix == "lora_" or name in ADOPTED
        )
        assert runs & set(checks_of(capability)) or by_command, capability
        if capability not in (Capability.MERGE, Capability.LORA_EXPORT):
            assert refusal(case.config(), capability) == reason


def test_limits_follow_the_fields():
    for capability in (Capability.BASE_4BIT, Capability.FSDP):
        assert refusal(petl.build_config("lora", init_lora_weights="pissa"), capability)
        assert not refusal(default_config("lora"), capability)
    inner = petl.build_config("binary", inner="loha", target_modules="all-linear")
    assert refusal(inner, Capability.BASE_4BIT) == row("loha")[Capability.BASE_4BIT]


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
        with pytest.raises(petl.InputError):
            testing.logits(adapted, case.batch(), adapter_names=["default"] * 4)
        testing.logits(adapted, case.batch())
