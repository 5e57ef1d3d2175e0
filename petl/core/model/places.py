"""The place of a module in a model's lists of layers."""

from typing import NamedTuple

from torch import nn

from petl.core.layers.class_swap import original_class


class Place(NamedTuple):
    """Position of a module: `name` inside block `index` of the `length` blocks of list `stack`.

    The name of a block itself is "block".
    """

    stack: str
    index: int
    length: int
    name: str


def is_stack(module: nn.Module) -> bool:
    """Return True for a list of layers: nn.ModuleList, or nn.Sequential of blocks of one class.

    timm has the latter; an nn.Sequential of torch's own layers is no list of blocks.
    """
    if not isinstance(module, nn.Sequential):
        return isinstance(module, nn.ModuleList)
    kinds = {original_class(entry) for entry in module}
    return len(kinds) == 1 and not kinds.pop().__module__.startswith("torch.nn.")


def place(model: nn.Module, key: str) -> Place | None:
    """Return the place of the module called `key`, or None if it is in no list of layers."""
    parts = key.split(".")
    module = model
    for depth, part in enumerate(parts[:-1]):
        # the outermost list counts, so lists of experts inside a block do not
        if is_stack(module):
            stack, name = ".".join(parts[:depth]), ".".join(parts[depth + 1 :])
            names = list(module._modules)
            return Place(stack, names.index(part), len(names), name)
        module = getattr(module, part)
    if is_stack(module) and any(module.get_submodule(parts[-1]).children()):  # a block itself
        names = list(module._modules)
        return Place(".".join(parts[:-1]), names.index(parts[-1]), len(names), "block")
    return None
