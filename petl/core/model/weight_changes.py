"""By how much adapters change the weights of a model."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from petl.core.compat import BaseTunerLayer, LoraLayer
from petl.core.layers.layer import AdapterLayer
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.types import StackLayer

CHANGES = "weight_change"  # name of the map
MEANING = "The Frobenius norm of the update, in percent of that of the weight which it changes."


def change_map(model: nn.Module, names: Sequence[str]) -> list[HeatMap]:
    """Return the heat map of `weight_changes`; empty if no change of a weight is known.

    Args:
        model: the base model.
        names: of the adapters.
    """
    changes = weight_changes(model, names)
    title, unit = "Change of the weights", "norm of the update, % of the weight's"
    return of_layers(model, changes, CHANGES, title, unit, MEANING)


@torch.no_grad()
def weight_changes(model: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """Return by module path the norm of the update in percent of the norm of the weight.

    Left out are adapters that are no update of one weight, weights that FSDP2 shards, and quantized
    ones under other methods of PEFT than LoRA.
    """
    changes = {}
    for path, layer in model.named_modules():
        if isinstance(layer, StackLayer) and not layer.get_param().is_meta:
            change = whole = 0.0
            for before, after in layer.merged_experts(names):
                change += float((after - before).square().sum())
                whole += float(before.square().sum())
            if whole:
                stack = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
                changes[stack] = 100 * (change / whole) ** 0.5
            continue
        if not isinstance(layer, BaseTunerLayer):
            continue
        weight: Tensor | None = getattr(layer.get_base_layer(), "weight", None)
        # a DTensor has a part of the rows here: its update is not computed without the others
        if isinstance(weight, Tensor) and not (weight.is_meta or isinstance(weight, DTensor)):
            updates = [u for name in names if (u := _update(layer, name)) is not None]
            if updates:
                norm = float(cast(Any, layer).get_base_weight().float().norm())
                # 1e-30: a weight of zeros gives a large number, not an error
                changes[path] = 100 * float(sum(updates).norm()) / max(norm, 1e-30)
    return changes


def _update(layer: BaseTunerLayer, name: str) -> Any:
    """The update of a weight by an adapter, float32 in the layout of the weight; None without."""
    if isinstance(layer, AdapterLayer):
        # not every layer has every adapter
        adapter = next((adapter for _, adapter in layer.pick([name])), None)
        if adapter is None or not adapter.is_matrix:
            return None
        return layer.get_delta_weight(name).float()
    if all(name not in getattr(layer, attribute) for attribute in layer.adapter_layer_names):
        return None
    host: Any = layer
    # variants (DoRA) scale the weight as well, which get_delta_weight leaves out
    if isinstance(layer, LoraLayer) and name not in host.lora_variant:
        return host.get_delta_weight(name).float()
    # copied and merged below, which quantized weights do not allow exactly
    if getattr(host, "quantization_backend", None) is not None:
        return None
    # other methods of PEFT have no function for it that all share; float32, or rounding the merged
    # weight would be most of the difference
    merged: Any = copy.deepcopy(host).float()
    merged.merge(adapter_names=[name])
    base = layer.get_base_layer()
    return merged.get_base_layer().weight - base.weight.float()
