"""Frozen weights that are cast to the dtype of autocast once, not in each forward and backward.

On a CPU, where autocast makes products in bfloat16 several times as fast, a step with few positions
spends a part of its time on them. The copies take half as much memory as the weights in float32.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from petl.core.support import Capability
from petl.efficiency.rewrite import Rewrite, Value
from petl.ops.packed import CAST, CastLinear, HeldLinear
from petl.system.collectives import is_sharded


class CastOnce(Rewrite):
    """Linear layers that keep a copy of their frozen weight in the dtype of autocast."""

    capability = Capability.CAST_ONCE
    saves = "frozen weights cast once, not in each pass"
    tries = True
    exact = True
    only_trains = True

    def refusal(self, model: nn.Module, value: Value = True) -> str:
        """Return that no weight is cast, or that the memory of the device is dearer."""
        if next(_frozen(model), None) is None:
            return "no frozen linear layer has a weight in float32"
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return "weights are cast fast on this device"
        return super().refusal(model, value)

    def change(self, model: nn.Module, value: Value = True) -> int:
        """Replace the classes of frozen linear layers."""
        layers = list(_frozen(model))
        for layer in layers:
            layer.__class__ = CastLinear
        return len(layers)

    def undo(self, model: nn.Module) -> None:
        """Give the layers their class again, and forget the copies."""
        for layer in model.modules():
            if type(layer) is CastLinear:
                vars(layer).pop(CAST, None)
                layer.__class__ = nn.Linear


@contextmanager
def cast_for_decoding(model: nn.Module) -> Generator[None]:
    """Inside the block, cast frozen weights once under autocast on a CPU, and not for each token.

    A token costs little more than reading the weights, and casting them reads and writes as much
    again. No weight may change inside the block; afterwards the copies are gone.
    """
    changed = []
    if torch.is_autocast_enabled("cpu") and not is_sharded(model):
        frozen = (layer for layer in _frozen(model) if layer.weight.device.type == "cpu")
        changed = [(layer, type(layer)) for layer in frozen]
    for layer, _ in changed:
        vars(layer).pop(CAST, None)  # an older copy may miss a change through `.data`
        layer.__class__ = HeldLinear
    try:
        yield
    finally:
        for layer, kind in changed:
            vars(layer).pop(CAST, None)
            layer.__class__ = kind


def _frozen(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers whose weight autocast would cast in each pass."""
    for layer in model.modules():
        is_own = isinstance(layer, nn.Linear) and type(layer) in (nn.Linear, CastLinear)
        if is_own and type(layer.weight) is nn.Parameter:
            weight = layer.weight
            # a tensor of inference mode has no version
            if (
                weight.dtype == torch.float32
                and not weight.requires_grad
                and not weight.is_inference()
            ):
                yield layer
