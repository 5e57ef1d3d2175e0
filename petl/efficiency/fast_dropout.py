"""Dropout of the base model on a CPU, with masks that are cheap to draw.

torch draws a float for each value on a CPU: 9 % of a step of MiniLM with LoRA, 12 % in bfloat16.
Here a value takes 16 random bits (petl/ops/dropout.py), and its mask a byte of memory, not four.
The distribution is the same, but for a probability rounded to a multiple of 2^-16, by whose exact
value the rest is scaled; the masks are others than torch's.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from petl.core.layers.class_swap import AdapterDict, SwappedClass, swap_class
from petl.core.support import Capability
from petl.efficiency.rewrite import Rewrite, Value
from petl.ops.dropout import dropout


class _FastDropout(SwappedClass):
    """Mixin for an nn.Dropout."""

    computes_as_before = True

    def forward(self: Any, x: Tensor) -> Tensor:
        plain = not self.training or self.p in (0, 1) or self.inplace
        if plain or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return dropout(x, self.p)


class FastDropout(Rewrite):
    """Dropout from 16 random bits a value."""

    capability = Capability.FAST_DROPOUT
    saves = "masks of dropout from 16 random bits a value"
    tries = True
    only_trains = True
    mixins: ClassVar[tuple[type[SwappedClass], ...]] = (_FastDropout,)

    def refusal(self, model: nn.Module, value: Value = True) -> str:
        """Return that there is nothing to draw, or that the device draws fast by itself."""
        found = next(_dropouts(model), None)
        if found is None:
            return "the base model has no dropout of its own"
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return "dropout is fast on this device"
        return super().refusal(model, value)

    def change(self, model: nn.Module, value: Value = True) -> int:
        """Swap the classes of the base model's dropout layers."""
        layers = list(_dropouts(model))
        for layer in layers:
            swap_class(layer, _FastDropout)
        return len(layers)


def _dropouts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the dropout layers of the base model that drop anything; those of adapters stay."""
    if type(module) is nn.Dropout and module.p > 0:
        yield module
    inner = module.children()
    if isinstance(module, BaseTunerLayer) and "base_layer" in module._modules:
        inner = iter([module.get_base_layer()])
    for child in inner:
        if not isinstance(child, AdapterDict):
            yield from _dropouts(child)
