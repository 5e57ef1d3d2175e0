"""PEFT's LoRA layer in the common case: one adapter on a plain frozen layer, in one function.

PEFT's own forward pass makes the update apart from the base layer's output, scales it, and adds it:
four more passes over tensors of that size, in float32 on a half-precision base, and with dropout a
float mask and a copy of the input for each layer. All other cases are left to it. `petl.wrap` gives
PEFT's layers as they are, so this is asked for.
"""

from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import LoraLinear
from petl.core.plain import is_plain, is_unwatched, product_dtype, takes
from petl.ops.low_rank import low_rank_linear


class FusedLoraLinear(LoraLinear):
    """PEFT's layer; what it computes is the same but for the order of rounding."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._alone(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        A, B = self.lora_A[name].get_parameter("weight"), self.lora_B[name].get_parameter("weight")
        base: Any = self.base_layer
        drop = self.lora_dropout[name]
        dropout = drop.p if drop.training and isinstance(drop, nn.Dropout) else 0.0
        x = x.to(product_dtype(x))
        scale = self.scaling[name]
        return low_rank_linear(x, base.weight, base.bias, A, B, scale, dropout=dropout)

    def _alone(self, x: Tensor) -> str | None:
        """The one adapter that computes, if it is plain, and so is the base layer."""
        if self._disable_adapters or self.merged_adapters or torch.compiler.is_compiling():
            return None
        active = self.active_adapters
        name = active[0] if len(active) == 1 and active[0] in self.lora_A else None
        base = self.base_layer
        if name is None or name in self.lora_variant or self.lora_bias.get(name):
            return None
        pair = (self.lora_A[name], self.lora_B[name])
        plain = (
            type(base) is nn.Linear
            and is_plain(base)
            and takes(base, x)
            and all(type(side) is nn.Linear and is_unwatched(side) for side in pair)
            and type(self.lora_dropout[name]) in (nn.Identity, nn.Dropout)
        )
        return name if plain else None


def fuse_lora(model: nn.Module) -> int:
    """Let PEFT's LoRA layers in `model` compute in one function where they can.

    Parameters, files and switching stay as they are. Outputs differ by rounding: on a base in half
    precision the update is computed in that, not in float32. On a CPU, dropout is drawn otherwise
    than PEFT's and rounded to a multiple of 1/256.

    Returns:
        How many layers that are.
    """
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in layers:
        layer.__class__ = FusedLoraLinear
    return len(layers)
