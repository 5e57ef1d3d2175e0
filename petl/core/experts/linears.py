"""The experts of a module as linear layers, which stand in it as children while they are adapted.

The layer of expert e of the stack `gate_up_proj` has the path `<module>.linears.gate_up_proj.<e>`.
A user names the stack by the path of its parameter, `<module>.gate_up_proj`.

In files the adapters of a stack have one tensor for all experts, under its own name: those of
`<module>.linears.<stack>.<e>.petl_<method>_adapters.<adapter>.<tensor>` are in
`<module>.petl_<method>_adapters.<stack>.<tensor>` [E, ...]. Tensors of which experts may have
different sizes keep the first name, without that of the adapter.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from petl.core.experts.layout import ExpertsLayout
from petl.ops.expert_linear import ExpertLinear, ExpertLinears

LINEARS = "linears"
LAYER = re.compile(rf"^(.*)\.{LINEARS}\.([^.]+)\.\d+$")  # the path of the layer of one expert
OF_EXPERT = re.compile(
    rf"(?P<module>.*)\.{LINEARS}\.(?P<stack>[^.]+)\.(?P<expert>\d+)\."
    r"(?P<slot>petl_\w+_adapters\.[^.]+)\.(?P<tensor>[^.]+)"
)
STACKED = re.compile(
    r"(?P<module>.*)\.(?P<slot>petl_\w+_adapters)\.(?P<stack>[^.]+)\.(?P<tensor>[^.]+)"
)


def linears_of(module: nn.Module) -> ExpertLinears | None:
    """Return the layers that a module of experts has been given, or None."""
    found = module._modules.get(LINEARS)
    return found if isinstance(found, ExpertLinears) else None


def add_linears(module: nn.Module, layout: ExpertsLayout, name: str) -> None:
    """Give a module of experts the layers of the stack called `name`, unless it has them."""
    if linears_of(module) is None:
        module.add_module(LINEARS, ExpertLinears())
    container = cast(ExpertLinears, linears_of(module))
    if name in container._modules:
        return
    layers = nn.Module()
    for expert in range(layout.count(module)):
        layer = ExpertLinear(
            module, name, expert, transposed=layout.transposed, has_bias=layout.bias
        )
        layers.add_module(str(expert), layer)
    container.add_module(name, layers)


def drop_unused(module: nn.Module) -> bool:
    """Remove the layers of the stacks without an adapter; return True if none are left."""
    container = linears_of(module)
    if container is None:
        return True
    for name in list(container._modules):
        if all(type(layer) is ExpertLinear for layer in container.layers(name)):
            delattr(container, name)
    if container._modules:
        return False
    delattr(module, LINEARS)
    return True


def paths_of_experts(stack: str, count: int) -> list[str]:
    """Return the paths of the layers of a stack, given the path of its parameter."""
    module, _, name = stack.rpartition(".")
    return [f"{module}.{LINEARS}.{name}.{expert}" for expert in range(count)]


def stack_of(path: str) -> str:
    """Return the path of the parameter that the layer of an expert is a slice of, or `path`."""
    return LAYER.sub(r"\1.\2", path)


def by_stack(paths: Iterable[str]) -> Iterator[str]:
    """Yield paths with those of the experts of a stack as one, the path of its parameter."""
    yield from dict.fromkeys(map(stack_of, paths))


# In files


def stack_experts(tensors: Mapping[str, Tensor], apart: Collection[str]) -> dict[str, Tensor]:
    """Return tensors by names in the model, with those of the experts of a stack as one.

    Args:
        tensors: of one adapter.
        apart: names of tensors that are never stacked.
    """
    found: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        match = OF_EXPERT.fullmatch(key)
        if match is None or match["tensor"] in apart:
            found[key] = tensor
        else:
            name = "{module}.{slot}.{stack}.{tensor}".format(**match.groupdict())
            groups.setdefault(name, []).append(key)
    for name, keys in groups.items():
        own = [tensors[key] for key in keys]
        if _are_alike(own):
            found[name] = torch.stack(own)
        else:
            found.update(zip(keys, own, strict=True))
    return found


def _are_alike(tensors: Iterable[Tensor]) -> bool:
    return len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `stack_experts` for tensors of a file, by their names without that of the adapter."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = STACKED.fullmatch(key)
        if match is None or tensor.dim() == 0:
            found[key] = tensor
            continue
        parts = match.groupdict()
        for expert, own in enumerate(tensor):
            name = "{module}.{linears}.{stack}.{expert}.{slot}.{tensor}"
            found[name.format(**parts, linears=LINEARS, expert=expert)] = own
    return found


def without_adapter(key: str, adapter_name: str) -> str | None:
    """Return the name in a file of a tensor of `stack_experts`; None if it is none."""
    before, found, after = key.partition(f"_adapters.{adapter_name}.")
    return f"{before}_adapters.{after}" if found and after.count(".") == 1 else None
