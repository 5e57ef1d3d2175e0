"""The section of experts: ratios to PEFT's forward pass on the same model."""

import pytest
from bench.mixture import GOALS, measure
from bench.records import Result
from bench.report import tables


@pytest.mark.slow
def test_a_step_on_stacks_is_compared_with_that_of_peft():
    small = {"hidden_size": 64, "num_hidden_layers": 1, "moe_intermediate_size": 32}
    found = measure(2, **small)
    assert len(found) == len(GOALS)
    assert all(each.counts["peak / LoRA"] < 1 for each in found[:1])
    assert len(tables(Result({}, found))) == len(GOALS)
