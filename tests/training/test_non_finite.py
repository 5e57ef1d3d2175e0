"""The first tensor that is not finite: a weight, or the output of a module."""

import math

import torch
from torch import nn

from petl.training.non_finite import first_not_finite


class Nested(nn.Module):
    """A module whose output is a dict with a tuple, as those of transformers may be."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return {"logits": (self.last(self.first(x)), x)}


def test_a_weight_is_named_before_outputs():
    model = Nested()
    model.last.weight.data[0, 0] = math.nan
    assert first_not_finite(model, []) == "the weight last.weight has values that are not finite"


def test_the_innermost_module_whose_output_is_not_finite_is_named():
    model = Nested()
    model.first.weight.data.fill_(3e38)  # finite, but sums overflow
    said = first_not_finite(model, [{"x": torch.zeros(1, 2)}, {"x": torch.ones(1, 2)}])
    assert said == "all weights are finite, and the first output that is not is that of first"


def test_a_finite_model_says_so_and_keeps_no_hook():
    model = Nested()
    assert first_not_finite(model, [{"x": torch.ones(1, 2)}]) == "all weights are finite"
    assert not torch.nn.modules.module._global_forward_hooks
