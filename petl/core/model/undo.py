"""A change of a model that is undone if it fails half-way."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Before:
    """The class, attributes, children and hooks of a module, without the modules below it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls, self.attributes = module, module.__class__, dict(vars(module))
        kinds = dict, list, set
        self.contents = [(v, v.copy()) for v in self.attributes.values() if isinstance(v, kinds)]

    def restore(self) -> None:
        self.module.__class__ = self.cls
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        # the same containers, which others may hold
        for container, content in self.contents:
            _fill(container, content)


def _fill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


@contextmanager
def undone_on_error(model: nn.Module) -> Generator[None]:
    """Give a model its modules, hooks and trained parameters back if the block raises.

    Values of weights are not kept, since a copy would need the memory of the model.
    """
    modules = [_Before(module) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:  # Ctrl-C, too
        for module in modules:
            module.restore()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
