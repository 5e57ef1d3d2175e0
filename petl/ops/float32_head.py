"""Heads that autocast leaves in float32.

Eight bits of an output that is a score make ties: numbers of a regression become equal, documents
keep the order in which they came, and the argmax of close classes is the first one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Float32Linear(nn.Linear):
    """nn.Linear that computes in float32 under autocast; it replaces the class of a live one."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `x W^T + b`, [..., O], for x [..., I]."""
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return super().forward(input)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


def keep_in_float32(heads: Iterable[nn.Module]) -> None:
    """Let the linear layers of heads compute in float32 under autocast."""
    for head in heads:
        for layer in head.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Float32Linear
