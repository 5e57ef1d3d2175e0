"""An adapter's config and tensors with its first k components alone, a plain adapter of width k.

Shapes: W width of the adapter, that of its widest layer; w of one layer, by `rank_pattern` or the
width of the model. Width k of a layer is min(k, w). Its scale is that of width W (`full`), so that
widths are prefixes of one sum, or the one that a run of its own at rank k has (`width`).
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

from peft import PeftConfig
from torch import Tensor

from petl.core.adapter_file import PREFIX
from petl.core.registry import method_of
from petl.core.spec.checks import pattern_value, rank_of
from petl.core.spec.components import Components, Ordered
from petl.core.spec.facts import facts_of
from petl.core.types import Fields
from petl.errors import InputError, UnsupportedError

ORDERED = "lora, rslora, dora, mola, adapter and compacter have"


def components_of(config: PeftConfig) -> Mapping[str, Components]:
    """Return the components of an adapter of this config, by name of a tensor of a layer.

    Raises:
        UnsupportedError: they have no order, with the reason.
    """
    entry = method_of(config)
    name = config.peft_type if entry is None else entry.name
    reason = "its components have no order" if entry is None else entry.components
    found = cast(Ordered, reason(config) if callable(reason) else reason)
    if isinstance(found, str):
        raise UnsupportedError(
            f"an adapter of {name} has no widths, components of which the first work alone: "
            f"{found}; {ORDERED}"
        )
    return found


def step_of(config: PeftConfig) -> int:
    """Return what widths below the adapter's own must be a multiple of."""
    return math.lcm(*(each.step for each in components_of(config).values()))


def layer_width(
    config: Any, components: Mapping[str, Components], path: str, tensors: Mapping[str, Tensor]
) -> int:
    """Return w of the layer at `path`, with these tensors, by name."""
    if config.r is not None:
        return rank_of(config, path, config.r)
    # by the width of the model
    name = next(name for name in components if name in tensors)
    found = components[name]
    return found.width(tensors[name].shape[found.dim])


def scale_ratio(config: PeftConfig, width: int, k: int, scale: str) -> float:
    """Return the scale of a layer of rank `width` that is cut to `k`, over its own."""
    ratio = width / k if scale == "width" else 1.0
    return math.sqrt(ratio) if facts_of(config).use_rslora else ratio


def at_width_in_config(
    config: PeftConfig, widths: Mapping[str, int], k: int, scale: str
) -> PeftConfig:
    """Return the config of the adapter of width `k`.

    Args:
        widths: w of each layer, by path.
        scale: one of `SCALES`.

    Raises:
        InputError: `k` is out of range, or the method cannot have it in all layers.
    """
    W, found = max(widths.values(), default=0), copy.deepcopy(config)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= W:
        raise InputError(f"width={k!r} is not in 1..{W}, the widths of this adapter")
    if k == W:
        return found
    step = step_of(config)
    if k % step:
        raise InputError(f"width={k} is not a multiple of {step}, the blocks of its bottleneck")
    facts = facts_of(config)
    pattern = {key: min(k, rank) for key, rank in (facts.rank_pattern or {}).items()}
    # narrower by the width of the model
    narrower = {p: w for p, w in widths.items() if pattern_value(pattern, p, k) > w}
    fields: Fields = {"r": k}
    if pattern or narrower:
        fields["rank_pattern"] = narrower | pattern
    if facts.lora_alpha is not None:
        fields |= _alphas(config, facts.lora_alpha, widths, k, scale)
    if narrower and not hasattr(config, "rank_pattern"):
        path, width = next(iter(narrower.items()))
        raise InputError(f"width={k} is above {width}, the width of {path}; take a smaller one")
    vars(found).update(fields)
    return found


def _alphas(config: Any, given: float, widths: Mapping[str, int], k: int, scale: str) -> Fields:
    """Return the fields with which the scale of each layer is that of width `k`."""
    ratio = scale_ratio(config, k, config.r, "width") if scale == "full" else 1.0
    alpha = _whole(given * ratio)
    # of petl's methods, the scale is lora_alpha / r in all layers
    if not hasattr(config, "alpha_pattern"):
        return {"lora_alpha": alpha}
    others = {}
    for path, width in widths.items():
        own = pattern_value(config.alpha_pattern, path, given)
        cut = scale_ratio(config, min(k, width), width, "width") if scale == "full" else 1.0
        if _whole(own * cut) != alpha:
            others[path] = _whole(own * cut)
    return {"lora_alpha": alpha, "alpha_pattern": others}


def _whole(value: float) -> float:
    """Return an integer where possible, as PEFT annotates alpha."""
    return int(value) if value == int(value) else value


def place_of(name: str, components: Mapping[str, Components]) -> tuple[str, str] | None:
    """Return path of the layer and name of the tensor of a name in a file; None: not cut."""
    parts = name.removeprefix(PREFIX).split(".")
    index = next((i for i, part in enumerate(parts) if part in components), None)
    # a bias of LoRA's B is of the outputs
    if index is None or parts[index + 1 :] == ["bias"]:
        return None
    path = [part for part in parts[:index] if not part.startswith("petl_")]
    return ".".join(path), parts[index]


def at_width_in_file(
    config: PeftConfig, tensors: Mapping[str, Tensor], k: int, scale: str
) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return an adapter's tensors and config at width `k`.

    Args:
        tensors: of a file, by name.
        scale: one of `SCALES`.

    Raises:
        InputError: `k` is out of range.
        UnsupportedError: the components have no order.
    """
    components = components_of(config)
    places = {name: place_of(name, components) for name in tensors}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, place in places.items():
        if place is not None:
            layers.setdefault(place[0], {})[place[1]] = tensors[name]
    widths = {path: layer_width(config, components, path, own) for path, own in layers.items()}
    found = at_width_in_config(config, widths, k, scale)
    cut = {}
    for name, place in places.items():
        cut[name] = tensors[name]
        if place is not None:
            width = widths[place[0]]
            cut[name] = components[place[1]].cut(tensors[name], width, min(k, width)).contiguous()
    return cut, found
