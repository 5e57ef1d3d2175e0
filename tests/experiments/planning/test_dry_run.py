"""Dry runs on tensors without values."""

import pytest
import torch

from petl.experiments.planning.dry_run import takes_mixed_batches, without_values
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
