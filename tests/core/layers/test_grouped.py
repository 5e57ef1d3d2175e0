"""Layers of adapters that train together."""

import torch
from torch import nn

from petl.core.layers.grouped import GroupedLora, drawing_from


def test_dropout_of_a_lora_acts_in_training_alone():
    factors = (nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(3, 2)), 1.0)
    dropouts = [nn.Dropout(0.5), nn.Dropout(0.25).eval(), nn.Identity()]
    layer = GroupedLora(nn.Linear(4, 3), [None] * 3, [factors] * 3, dropouts)
    assert layer.rates() == [0.5, 0.0, 0.0]


def test_draws_from_a_generator_go_on_where_they_ended_and_leave_the_others_as_they_are():
    generator = torch.Generator().manual_seed(3)
    expected = torch.rand(6, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    others = torch.rand(2)
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        with drawing_from(generator):
            found.append(torch.rand(3))
    assert torch.equal(torch.cat(found), expected)
    assert torch.equal(torch.rand(2), others)
