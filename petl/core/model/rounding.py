"""What rounding leaves of an update that is merged: into half precision, or quantized weights."""

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer
from petl.core.types import StackLayer
from petl.errors import UnsupportedError

LARGEST = 0.05  # share of an update's norm that may be lost
EXACT = (torch.float32, torch.float64)


def refuse_rounding(model: nn.Module, names: Sequence[str] | None) -> None:
    """Raise UnsupportedError if merging these adapters loses more than `LARGEST` of the update.

    Args:
        names: of the adapters; None: the active ones.
    """
    lost, what = lost_share(model, names)
    if lost > LARGEST:
        raise UnsupportedError(
            f"rounding to {what} would lose {100 * lost:.0f} % of the update's norm, more than "
            f"{100 * LARGEST:.0f} %: merge into a base in float32 (petl merge --dtype float32), "
            "keep the adapter, or allow it by lossy=True (petl merge --tolerance)"
        )


@torch.no_grad()
def lost_share(model: nn.Module, names: Sequence[str] | None) -> tuple[float, str]:
    """Return the share of the update's norm that merging rounds off, and the type of the weights.

    Layers in float32 round off next to nothing and are not computed; nor are those whose base is no
    module with one weight.
    """
    lost = whole = 0.0
    what = ""
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer) or layer.merged_adapters:
            continue
        for before, exact, rounded, kind in _merged_parts(layer, names):
            what = kind
            lost += float((rounded - exact).square().sum(dtype=torch.float64))
            whole += float((exact - before).square().sum(dtype=torch.float64))
    return (lost / whole) ** 0.5 if whole else 0.0, what


def _merged_parts(
    layer: nn.Module, names: Sequence[str] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, str]]:
    """Yield what `_merged` returns, of stacked experts one by one."""
    if isinstance(layer, StackLayer):
        # one by one: the sums of a whole stack would be a second one in float32
        weight = layer.get_param()
        if weight.is_meta or weight.dtype in EXACT:
            return
        what = str(weight.dtype).removeprefix("torch.")
        for before, exact in layer.merged_experts(
            layer.active_adapters if names is None else names
        ):
            yield before, exact, exact.to(weight.dtype).float(), what
        return
    found = _merged(layer, names)
    if found is not None:
        yield found


def _merged(layer: Any, names: Sequence[str] | None) -> tuple[Tensor, Tensor, Tensor, str] | None:
    """Return a base weight in float32, with the update, and with it as rounded; None: not known."""
    base = layer._modules.get("base_layer")
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.dtype in EXACT:
        return None
    backend = getattr(layer, "quantization_backend", None)
    before = layer.get_base_weight().float()
    if backend is None:
        exact = _merged_into(layer, copy.deepcopy(base).float(), names)
        what = str(weight.dtype).removeprefix("torch.")
    elif hasattr(layer, "get_delta_weight"):
        chosen = layer.active_adapters if names is None else names
        own = [name for name in chosen if name in layer._all_available_adapter_names()]
        exact = before + sum(layer.get_delta_weight(name).float() for name in own)
        what = f"{backend.backend_name} weights"
    else:
        return None
    return before, exact, _merged_into(layer, copy.deepcopy(base), names), what


def _merged_into(layer: Any, base: nn.Module, names: Sequence[str] | None) -> Tensor:
    """Return the weight of another base layer, with the adapters of `layer` merged, in float32."""
    with _on(layer, base):
        layer.merge(adapter_names=names)
        return layer.get_base_weight().float()


@contextmanager
def _on(layer: Any, base: nn.Module) -> Generator[None]:
    """Let the layer stand on another base in the block."""
    own, merged = layer._modules["base_layer"], list(layer.merged_adapters)
    layer._modules["base_layer"] = base
    try:
        yield
    finally:
        layer._modules["base_layer"] = own
        layer.merged_adapters[:] = merged
