"""The experts of a module as linear layers, which stand in it as children while they are adapted.

The layer of expert e of the stack `gate_up_proj` has the path `<module>.linears.gate_up_proj.<e>`.
A user names the stack by the path of its parameter, `<module>.gate_up_proj`.
"""

import re
from collections.abc import Iterable, Iterator
from typing import cast

from torch import nn

from petl.core.experts.layout import ExpertsLayout
from petl.ops.expert_linear import ExpertLinear, ExpertLinears

LINEARS = "linears"
LAYER = re.compile(rf"^(.*)\.{LINEARS}\.([^.]+)\.\d+$")  # the path of the layer of one expert


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
