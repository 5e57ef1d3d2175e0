"""Adding, switching and deleting adapters at the cost of those concerned, however many there are.

PEFT walks over all modules of a model for it, those of idle adapters included, and over all
adapters of each layer: among N adapters a switch costs N times what it costs among one, and adding
them all N^2 times. Here it is shown the adapters that are concerned and no others. A forward pass
finds all of them at any time, one in another thread included.
"""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from petl.core.compat import AuxiliaryTrainingWrapper
from petl.core.layer import AdapterLayer
from petl.core.listening import ListeningTuner
from petl.core.shelf import Shelf


class SwitchingTuner(ListeningTuner):
    """Shows PEFT the adapters that are concerned; holds what the layers of each share.

    Attributes:
        beside: adapters that train by `set_requires_grad`, active or not. What trains is known by
            that and by which are active: parameters of an idle adapter whose `requires_grad` was
            set by hand keep it through a switch.
    """

    tuner_layer_cls = AdapterLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.beside: set[str] = set()
        self._is_showing = False
        super().__init__(*args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        setattr(self, self.pools_name, Shelf())

    @property
    def pools_name(self) -> str:
        return f"{self.prefix}pools"

    @property
    def pools(self) -> Shelf:
        """By adapter name, the tensors that its layers share."""
        return getattr(self, self.pools_name)

    @contextmanager
    def showing(self, names: Collection[str]) -> Generator[None]:
        """Within it, walks over the model, its state dict and PEFT find these adapters alone.

        Those that are added within are found as well. Within another, it does nothing.
        """
        if self._is_showing:
            yield
            return
        shelves = [self.pools, *(layer.shelf for layer in layers_of(self.model))]
        self._is_showing = True
        for shelf in shelves:
            shelf.show(names)
        try:
            yield
        finally:
            for shelf in shelves:
                shelf.show_all()
            self._is_showing = False

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; they train unless `inference_mode`, and no others do."""
        if self._is_showing:  # to add an adapter, which leaves alone how others train
            super().set_adapter(adapter_name, inference_mode)
            return
        with self.showing({*_names(adapter_name), *self._awake()}):
            super().set_adapter(adapter_name, inference_mode)
        self.beside.clear()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let these adapters train, or not, whether they are active or not."""
        names = set(_names(adapter_names))
        self.beside = self.beside | names if requires_grad else self.beside - names
        with self.showing(names):
            super().set_requires_grad(adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with self.showing(self._awake()):
            super()._enable_adapter_layers(enabled)
        self.beside.clear()  # PEFT freezes them either way

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, the tensors that its layers share included."""
        if adapter_name in self._awake():  # PEFT looks among all for one to be active instead
            super().delete_adapter(adapter_name)
        else:
            with self.showing({adapter_name}):
                super().delete_adapter(adapter_name)
        self.beside.discard(adapter_name)
        if adapter_name in self.pools:
            del self.pools[adapter_name]

    def _awake(self) -> set[str]:
        """The adapters that are active on some layer, and those that may train beside them."""
        active = (name for layer in layers_of(self.model) for name in layer.active_adapters)
        return {*active, *self.beside}


def _names(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def hosts_of(model: nn.Module) -> Iterator[AdapterLayer | AuxiliaryTrainingWrapper]:
    """Whatever holds adapters by name in a model, without a look at the adapters of layers."""
    left, seen = [model], {model}
    while left:
        module = left.pop()
        if isinstance(module, AdapterLayer | AuxiliaryTrainingWrapper):
            yield module
        inner = [module.base_layer] if isinstance(module, AdapterLayer) else module.children()
        fresh = [child for child in inner if child not in seen]
        seen.update(fresh)
        left += reversed(fresh)


def layers_of(model: nn.Module) -> Iterator[AdapterLayer]:
    """The adapter layers of a model, without a look at their adapters."""
    return (host for host in hosts_of(model) if isinstance(host, AdapterLayer))
