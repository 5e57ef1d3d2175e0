"""Fused forward pass of PEFT's LoRA layer with one adapter on a frozen linear layer.

PEFT's own forward pass computes the update apart from the base layer's output, scales it, and adds
it: four more passes over tensors of that size, in float32 on a half-precision base, and with
dropout a float mask and a copy of the input for each layer. All other cases run PEFT's code.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import LoraLinear
from petl.core.layers.mixed_batch import AdapterRows
from petl.ops.low_rank import LINEAR, LowRankRows, has_no_hooks, linear_with_low_rank, owns_output


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer with a fused forward pass; outputs differ by rounding only."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        # under torch.compile PEFT's code runs, which the compiler can fuse
        name = None if args or kwargs or torch.compiler.is_compiling() else self._only_active()
        if name is None:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[name]
        drop_rate = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        y = linear_with_low_rank(x, self.base_layer, *self._factors(name), drop_rate)
        return super().forward(x) if y is None else y  # None: the base has hooks or is no linear

    def _only_active(self) -> str | None:
        """Return the name of the only active adapter if it is a plain LoRA, else None."""
        if self._disable_adapters or self.merged_adapters:
            return None
        active = self.active_adapters
        name = active[0] if len(active) == 1 and active[0] in self.lora_A else None
        return name if name is not None and self._is_plain(name) else None

    def _is_plain(self, name: str) -> bool:
        """Return True if an adapter of this layer is two factors: no variant (DoRA), no bias."""
        if name in self.lora_variant or self.lora_bias.get(name):
            return False
        linear = _is_linear(self.lora_A[name]) and _is_linear(self.lora_B[name])
        # PEFT uses Identity for a probability of 0
        return linear and type(self.lora_dropout[name]) in (nn.Identity, nn.Dropout)

    def _mixed_batch_forward(
        self, x: Tensor, *args: object, adapter_names: list[str], **kwargs: object
    ) -> Tensor:
        """Apply one adapter per row: all together if they are plain, else one by one as PEFT."""
        has_arguments = args or any(value is not None for value in kwargs.values())
        # the rest are errors or cases for which PEFT has messages or code of its own
        if not (has_arguments or self.training or len(adapter_names) != len(x)):
            y = self._mixed(x, AdapterRows.of(adapter_names))
            if y is not None:
                return y
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def _mixed(self, x: Tensor, rows: AdapterRows) -> Tensor | None:
        """Return the output for rows whose adapters are all plain, else None."""
        if len(rows.distinct) == 1:
            name = rows.distinct[0]
            if not (name in self.lora_A and self._is_plain(name)):
                return None
            return linear_with_low_rank(x, self.base_layer, *self._factors(name))
        prepared = rows.prepared(self, x, self.lora_A, self._batched)
        if prepared is None:
            return None
        return prepared.compute(x, self.base_layer(x), is_own=owns_output(self.base_layer))

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
    """Return True if a factor is an nn.Linear without hooks.

    The method binary swaps the class of its factors; `original` is the class before. Decoding with
    packed weights swaps that of every nn.Linear.
    """
    cls = type(side)
    return vars(cls).get("original", cls) in LINEAR and has_no_hooks(side)


def fuse_layers(model: nn.Module) -> int:
    """Turn PEFT's LoRA layers in `model` into fused ones and return their number."""
    # not subclasses: their forward passes may differ
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in layers:
        # no state of its own, so assigning the class is enough; pickle finds it by name
        layer.__class__ = FusedLoraLinear
    return len(layers)
