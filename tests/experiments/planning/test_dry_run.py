"""Dry runs on tensors without values."""

import pytest
import torch
from mixtures import IDS, adapted

from petl.experiments.planning.dry_run import pass_memory, takes_mixed_batches, without_values
from petl.testing import Case


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("mola", "bert"), True),
        (Case("adapter", "bert", {"r": 4, "placement": "parallel"}), True),  # captures an input
        (Case("dora", "llama", {"target_modules": ["q_proj"]}), False),
    ],
    ids=str,
)
def test_whether_a_method_takes_mixed_batches_is_found_without_values(case, expected):
    model = case.wrap()
    with without_values(model, torch.device("cpu")):
        assert takes_mixed_batches(model) is expected


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "aria"])
def test_experts_run_on_shapes_with_and_without_adapters(name, capfd):
    # the other block keeps its own forward pass, whose product torch has not for these tensors
    model = adapted(name, target_parameters=["layers.1.mlp.experts.down_proj"])
    batch = {"input_ids": IDS, "labels": IDS}
    with without_values(model, torch.device("cpu")):
        found = pass_memory(model, batch, torch.device("cpu"))
    assert 0 < found.kept <= found.peak
    assert found.operations > 2 * 3 * 32 * 24 * 2 * IDS.numel()  # of the experts of a block
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.thorough
def test_a_model_that_counts_the_tokens_of_its_images_runs_on_shapes():
    case = Case("lora", "llava", {"target_modules": "all-linear"})
    model, batch = case.wrap(), case.batch()
    with without_values(model, torch.device("cpu")):
        found = pass_memory(model, batch, torch.device("cpu"))
    assert found.peak > found.kept > 0
