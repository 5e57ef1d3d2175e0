"""A model at a smaller width: its layers compute with the first components of an adapter.

What computes is swapped in dicts: tensors of PEFT's LoRA for views of them, its scales, and an
adapter of petl for one of width k that has views of its tensors. Nothing is copied but tensors with
several blocks of components (those of MoLA's experts, a bias of Compacter), which are small.
"""

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from petl.core.adapter_widths.cuts import (
    at_width_in_config,
    components_of,
    layer_width,
    scale_ratio,
)
from petl.core.adapter_widths.record import nested_of
from petl.core.compat import LoraLayer
from petl.core.layers.context import ForwardContext
from petl.core.layers.layer import Adapter, AdapterLayer
from petl.core.spec.components import SCALES, Components
from petl.errors import InputError, UnsupportedError, choose
from petl.system.collectives import is_sharded

Swap = tuple[dict[str, Any], str, Callable[[], Any]]  # an entry of a dict, and its new value


@contextmanager
def at_width(model: PeftModel, k: int, scale: str | None = None) -> Generator[None]:
    """Inside the block the active adapter computes with its first `k` components.

    Their outputs are those of the adapter that `narrow` writes; gradients go to these components.
    Behind the block, also after an error, the adapter is as before. Save, merge, add and switch
    adapters outside of it. A checkpointed forward pass needs its backward pass inside.

    Args:
        model: its active adapter is a LoRA, `mola`, `adapter` or `compacter`.
        k: from 1 to the width of the adapter, that of its widest layer; layers that are narrower
            keep their own.
        scale: of the update: "full", that of the whole adapter, or "width", that of a run of its
            own at rank k; None: as the adapter was trained (`+loss=nested`, or nested.json beside
            a folder that `petl.load` has read), else "full".

    Raises:
        InputError: `k` or `scale` is out of range, several adapters are active, or one is merged.
        UnsupportedError: the components of the adapter have no order.
    """
    name = active_name(model)
    if scale is None:
        nested = nested_of(model, name)
        scale = "full" if nested is None else nested.scale
    with Narrowed(model, name, k, scale).applied():
        yield


def active_name(model: PeftModel) -> str:
    """Return the name of the active adapter.

    Raises:
        InputError: several are active.
    """
    active = list(model.active_adapters)
    if len(active) != 1:
        raise InputError(f"{len(active)} adapters are active ({', '.join(active)}); activate one")
    return active[0]


def widths_of(model: PeftModel, name: str) -> dict[str, int]:
    """Return the width of each layer of an adapter, by path in the base model.

    Raises:
        UnsupportedError: its components have no order.
    """
    config = model.peft_config[name]
    components = components_of(config)
    return {
        path: layer_width(config, components, path, _tensors(layer, name))
        for path, layer in _layers(model, name)
    }


def _layers(model: PeftModel, name: str) -> Iterator[tuple[str, Any]]:
    """Yield path and layer of each layer with the adapter."""
    for path, layer in model.get_base_model().named_modules():
        is_own = isinstance(layer, AdapterLayer) and name in layer.adapters
        if is_own or (isinstance(layer, LoraLayer) and name in layer.r):
            yield path, layer


def _tensors(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of petl's adapter on a layer by name; of PEFT's none."""
    own = isinstance(layer, AdapterLayer)
    return cast(Adapter, layer.adapters[name]).tensors() if own else {}


class Narrowed:
    """The layers of an adapter at width `k`; `applied` any number of times.

    Args:
        context: what petl's adapters share at this width; None: that of the whole adapter.

    Attributes:
        swaps: by path of a layer, what is swapped there.
        in_use: True inside `applied`.

    Raises:
        InputError, UnsupportedError: as `at_width`, and for a sharded model.
    """

    def __init__(
        self,
        model: PeftModel,
        name: str,
        k: int,
        scale: str,
        context: ForwardContext | None = None,
    ) -> None:
        choose(dict.fromkeys(SCALES), scale, "scale")
        self.config: PeftConfig = model.peft_config[name]
        self.components, self.context = components_of(self.config), context
        widths = widths_of(model, name)
        self.cut: PeftConfig = at_width_in_config(self.config, widths, k, scale)
        if is_sharded(model):
            raise UnsupportedError(
                f"width={k} of a sharded model is not possible: each process has parts of the "
                "components; use DDP"
            )
        self.swaps: dict[str, list[Swap]] = {}
        self.in_use = False
        for path, layer in _layers(model, name):
            if layer.merged:
                raise InputError(
                    f"{path} has merged {layer.merged_adapters}, of which no width can be taken; "
                    "call unmerge_adapter() first"
                )
            width = widths[path]
            if k == max(widths.values()):
                continue
            if isinstance(layer, AdapterLayer):
                self.swaps[path] = [self._of_adapter(layer, name, width, min(k, width))]
            elif k < width:
                ratio = scale_ratio(self.config, width, k, scale)
                self.swaps[path] = self._of_lora(layer, name, width, k, ratio)

    def _of_lora(self, layer: Any, name: str, width: int, k: int, ratio: float) -> list[Swap]:
        swaps: list[Swap] = []
        for part, components in self.components.items():
            held = getattr(layer, part)
            if name in held:
                # a linear layer, a convolution, or a dict of parameters
                is_module = isinstance(held[name], nn.Module)
                owner = held[name] if is_module else held
                entries, place = owner._parameters, "weight" if is_module else name
                make = partial(self._cut, components, entries, place, width, k)
                swaps.append((entries, place, make))
        scaling = layer.scaling[name] * ratio
        return [*swaps, (layer.scaling, name, lambda: scaling)]

    def _of_adapter(self, layer: AdapterLayer, name: str, width: int, k: int) -> Swap:
        adapter = cast(Adapter, layer.adapters[name])
        info = copy.copy(adapter.info)
        info.context = self.context or info.context
        # its sizes and settings; the meta device, whose tensors have no values, draws no numbers
        with torch.device("meta"):
            cut = type(adapter)(adapter.shape, self.cut, info)
        names = [*cut._parameters, *cut._buffers]
        cut._parameters.clear()
        cut._buffers.clear()

        def views() -> Adapter:
            cut.training = adapter.training
            for each in names:
                tensor, found = getattr(adapter, each), self.components.get(each)
                # beside the parameters: it has none of its own
                vars(cut)[each] = tensor if found is None else found.cut(tensor, width, k)
            return cut

        return layer.adapters, name, views

    @staticmethod
    def _cut(
        part: Components, entries: dict[str, Tensor], place: str, width: int, k: int
    ) -> Tensor:
        return part.cut(entries[place], width, k)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Inside the block the layers compute at this width; again inside it, nothing changes."""
        if self.in_use:
            yield
            return
        swaps = [swap for swaps in self.swaps.values() for swap in swaps]
        kept = [(entries, key, entries[key]) for entries, key, _ in swaps]
        self.in_use = True
        try:
            for entries, key, make in swaps:
                entries[key] = make()
            yield
        finally:
            self.in_use = False
            for entries, key, value in kept:
                entries[key] = value
