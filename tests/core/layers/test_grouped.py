"""Layers of adapters that train together."""

import torch
from torch import nn

from petl.core.layers.grouped import GroupedLora


def test_dropout_of_a_lora_acts_in_training_alone():
    factors = (nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(3, 2)), 1.0)
    dropouts = [nn.Dropout(0.5), nn.Dropout(0.25).eval(), nn.Identity()]
    layer = GroupedLora(nn.Linear(4, 3), [None] * 3, [factors] * 3, dropouts)
    assert layer.rates() == [0.5, 0.0, 0.0]
