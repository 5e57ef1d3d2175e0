"""PEFT's LoRA layer in the common case: one adapter on a plain frozen layer, in one function.

PEFT's own forward pass makes the update apart from the base layer's output, scales it, and adds it:
four more passes over tensors of that size, in float32 on a half-precision base, and with dropout a
float mask and a copy of the input for each layer. All other cases are left to it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import LoraLinear
from petl.core.serving.mixed_batch import AdapterRows
from petl.ops.low_rank import LowRankRows, has_no_hooks, linear_with_low_rank, owns_output


class FusedLoraLinear(LoraLinear):
    """PEFT's layer; what it computes is the same but for the order of rounding."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs or torch.compiler.is_compiling() else self._alone()
        if name is None:
            return super().forward(x, *args, **kwargs)
        drop: Any = self.lora_dropout[name]
        share = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
        y = linear_with_low_rank(x, self.base_layer, *self._factors(name), share)
        return super().forward(x) if y is None else y

    def _alone(self) -> str | None:
        """The one adapter that computes, if it is a plain one."""
        if self._disable_adapters or self.merged_adapters:
            return None
        active = self.active_adapters
        name = active[0] if len(active) == 1 and active[0] in self.lora_A else None
        return name if name is not None and self._is_plain(name) else None

    def _is_plain(self, name: str) -> bool:
        """Whether an adapter of this layer is two factors and no more."""
        if name in self.lora_variant or self.lora_bias.get(name):
            return False
        linear = _is_linear(self.lora_A[name]) and _is_linear(self.lora_B[name])
        return linear and type(self.lora_dropout[name]) in (nn.Identity, nn.Dropout)

    def _mixed_batch_forward(
        self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> Tensor:
        """One adapter per row: all at once where they are alike, else PEFT's, one by one."""
        asks = args or any(value is not None for value in kwargs.values())
        if not (asks or self.training or len(adapter_names) != len(x)):
            y = self._mixed(x, AdapterRows.of(adapter_names))
            if y is not None:
                return y
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def _mixed(self, x: Tensor, rows: AdapterRows) -> Tensor | None:
        """The output for rows with adapters that are two factors and no more; None for others."""
        if len(rows.distinct) == 1:
            name = rows.distinct[0]
            if not (name in self.lora_A and self._is_plain(name)):
                return None
            return linear_with_low_rank(x, self.base_layer, *self._factors(name))
        found = rows.prepared(self, x, self.lora_A, self._batched)
        if found is None:
            return None
        return found.compute(x, self.base_layer(x), is_own=owns_output(self.base_layer))

    def _batched(self, names: Sequence[str], dtype: torch.dtype) -> LowRankRows | None:
        if not all(map(self._is_plain, set(names))):
            return None
        factors = {name: self._factors(name) for name in set(names)}
        return LowRankRows.stack([factors[name] for name in names], dtype)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        A: Any = self.lora_A[name].weight
        B: Any = self.lora_B[name].weight
        return A, B, self.scaling[name]


def _is_linear(side: nn.Module) -> bool:
    """Whether a factor is a linear layer, quantised ones (which name what they were) included."""
    kind = type(side)
    return vars(kind).get("original", kind) is nn.Linear and has_no_hooks(side)


def fuse_layers(model: nn.Module) -> int:
    """Make layers that are PEFT's fused ones; how many that are."""
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in layers:
        layer.__class__ = FusedLoraLinear
    return len(layers)
