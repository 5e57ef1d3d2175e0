"""The change of each weight, against the weights of the merged model."""

import pytest
from contract_cases import adopted, binary_over, own
from torch import nn

import petl
from petl.core.model.weight_changes import weight_changes
from petl.testing import tiny_llama
from petl.testing.case import Case

ADOPTED = ("lora", "dora", "oft", "ia3", "ln_tuning", "vera")
CASES = [own("mos", "llama"), own("sparse", "gpt2"), *(adopted(name, "llama") for name in ADOPTED)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_change_is_that_of_merging(case: Case):
    model = case.wrap_stirred()
    before = {name: p.detach() for name, p in case.base().named_parameters()}
    found = weight_changes(model.base_model.model, ["default"])
    merged = dict(model.merge_and_unload().named_parameters())
    assert found
    for path, percent in found.items():
        weight = before[f"{path}.weight"]
        change = (merged[f"{path}.weight"] - weight).norm() / weight.norm()
        assert percent == pytest.approx(100 * float(change), rel=1e-3), path


def test_only_adapters_that_are_given_count():
    model = petl.wrap(tiny_llama(1), "lora", target_modules=["q_proj"])
    assert list(weight_changes(model.base_model.model, ["other"])) == []
    assert list(weight_changes(model.base_model.model, ["default"]).values()) == [0.0]


def test_adapters_that_are_no_update_of_a_weight_are_left_out():
    model = petl.wrap(tiny_llama(1), "mola", num_experts=2)
    assert weight_changes(model.base_model.model, ["default"]) == {}
    assert weight_changes(nn.Linear(2, 2), ["default"]) == {}


def test_a_quantized_lora_changes_by_what_it_computes_with():
    model = binary_over("lora", r=4, target_modules="block-linear").wrap_stirred().base_model.model
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    expected = layer.get_delta_weight("default").norm() / layer.get_base_layer().weight.norm()
    found = weight_changes(model, ["default"])
    key = next(key for key in found if key.endswith("q_proj"))
    assert found[key] == pytest.approx(100 * float(expected))
