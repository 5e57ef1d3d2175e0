"""Adding, switching and deleting adapters at the cost of those concerned, however many there are.

PEFT walks over all modules of a model for it, those of idle adapters included, and over all
adapters of each layer: among N adapters a switch costs N times what it costs among one, and adding
them all N^2 times. Here it is shown the adapters that are concerned and no others. A forward pass
finds all of them at any time, one in another thread included.
"""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import RLock
from typing import Any, Self, cast

from peft import PeftModel
from torch import nn

from petl.core.compat import (
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    ModulesToSaveWrapper,
)
from petl.core.layers.adapter_dict import AdapterDict, convert_module_dicts
from petl.core.layers.class_swap import SwappedClass, swap_class
from petl.core.layers.layer import AdapterLayer
from petl.errors import UnsupportedError

LOCK = RLock()  # shows at a time; of all tuners, since copies and pickles cannot have one
HOSTS = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # hold adapters, or heads that train with them


class SwitchingTuner(BaseTuner):
    """Shows PEFT the adapters that are concerned, of what layers and heads have on a `AdapterDict`.

    Mixed into a tuner, before its class. Layers that have their adapters elsewhere are left to
    PEFT, which looks at all that those have.

    Attributes:
        beside: adapters that train by `set_requires_grad`, active or not. What trains is known by
            that and by which are active: parameters of an idle adapter whose `requires_grad` was
            set by hand keep it through a switch.
        fresh: adapters that were added in evaluation mode and are not in it, as PEFT leaves them.
    """

    extra_trainable: set[str]
    newly_added: set[str]
    _is_restricted = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.extra_trainable, self.newly_added = set(), set()
        super().__init__(*args, **kwargs)

    @contextmanager
    def only_visible(self, names: Collection[str]) -> Generator[None]:
        """Within it, walks over the model, its state dict and PEFT find these adapters alone.

        Those that are added within are found as well. Within another, it does nothing.
        """
        with LOCK:
            if self._is_restricted:
                yield
                return
            adapter_dicts = list(adapter_dicts_of(self))
            self._is_restricted = True
            for adapter_dict in adapter_dicts:
                adapter_dict.show_only(names)
            try:
                yield
            finally:
                for adapter_dict in adapter_dicts:
                    adapter_dict.show_all()
                self._is_restricted = False

    @contextmanager
    def entering(
        self, context: AbstractContextManager[Any], names: Collection[str]
    ) -> Generator[None]:
        """`context`, which is shown these adapters alone while it begins."""
        with ExitStack() as stack:
            with self.only_visible(names):
                stack.enter_context(context)
            yield

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject an adapter with PEFT, then call `convert_layers`."""
        before = self.in_use()
        with self.only_visible({adapter_name}):
            trained = [(p, p.requires_grad) for p in _active_heads(model)]
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for parameter, requires_grad in trained:  # PEFT has set those that are out of sight too
                parameter.requires_grad_(requires_grad)
            self.convert_layers()
        # what was active on single layers, after a deletion, is so no more and trains on
        self.extra_trainable |= before - set(self.active_adapters)
        if not self.training:
            self.newly_added.add(adapter_name)

    def convert_layers(self) -> None:
        """Shelve what PEFT has put in the model: heads that train with adapters."""
        for head in _heads(self.model):
            convert_module_dicts(head)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, also of adapters that are out of sight and in another."""
        with LOCK:
            differ = self.training != mode or self.model.training != mode
            super().train(mode)
            if self._is_restricted:
                for adapter_dict in adapter_dicts_of(self):
                    for name in adapter_dict if differ else self.newly_added & adapter_dict.keys():
                        adapter_dict[name].train(mode)
            self.newly_added.clear()
        return self

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with self.only_visible({adapter_name}):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; they train unless `inference_mode`, and no others do."""
        with LOCK:
            if self._is_restricted:  # to add an adapter, which leaves alone how others train
                super().set_adapter(adapter_name, inference_mode)
                return
            with self.only_visible({*_names(adapter_name), *self.in_use()}):
                super().set_adapter(adapter_name, inference_mode)
            self._forget_frozen()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let these adapters train, or not, whether they are active or not."""
        names = set(_names(adapter_names))
        self.extra_trainable = (
            self.extra_trainable | names if requires_grad else self.extra_trainable - names
        )
        with self.only_visible(names):
            super().set_requires_grad(adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with self.only_visible(self.in_use()):
            super()._enable_adapter_layers(enabled)
        self._forget_frozen()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; another one becomes active where none is left."""
        in_use = self.in_use()
        heirs = self._fallbacks(adapter_name) if adapter_name in in_use else set()
        with self.only_visible({adapter_name, *in_use, *heirs}):
            super().delete_adapter(adapter_name)
        self.extra_trainable.discard(adapter_name)
        self.newly_added.discard(adapter_name)

    def in_use(self) -> set[str]:
        """The adapters that are active on some layer, and those that may train beside them."""
        hosts = (
            module for module in outside_adapter_dicts(self.model) if isinstance(module, HOSTS)
        )
        return {*self.extra_trainable, *(name for host in hosts for name in host.active_adapters)}

    def _fallbacks(self, adapter_name: str) -> set[str]:
        """The adapters that PEFT makes active on a layer that loses its only active one."""
        layers = (m for m in outside_adapter_dicts(self.model) if isinstance(m, BaseTunerLayer))
        lost = (layer for layer in layers if layer.active_adapters == [adapter_name])
        left = ({*layer._all_available_adapter_names()} - {adapter_name} for layer in lost)
        return {min(names) for names in left if names}

    def _forget_frozen(self) -> None:
        """Remove frozen adapters from `extra_trainable`: PEFT freezes layers, heads not always."""
        adapter_dicts = list(adapter_dicts_of(self)) if self.extra_trainable else []
        self.extra_trainable = {
            name
            for name in self.extra_trainable
            if any(
                is_trainable(adapter_dict[name])
                for adapter_dict in adapter_dicts
                if name in adapter_dict
            )
        }


def is_trainable(module: nn.Module) -> bool:
    """Whether any parameter of a module does."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _heads(model: nn.Module) -> Iterator[ModulesToSaveWrapper]:
    return (m for m in outside_adapter_dicts(model) if isinstance(m, ModulesToSaveWrapper))


def _active_heads(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the heads of active adapters."""
    for head in _heads(model):
        for name in head.active_adapters:
            yield from head.modules_to_save[name].parameters()


def _names(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def outside_adapter_dicts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, its shelves included, without a look into those."""
    left, seen = [model], {model}
    while left:
        module = left.pop()
        yield module
        inner = () if isinstance(module, AdapterDict) else module.children()
        unseen = [child for child in inner if child not in seen]
        seen.update(unseen)
        left += reversed(unseen)


def adapter_dicts_of(model: nn.Module) -> Iterator[AdapterDict]:
    """The shelves of a model that are not on others."""
    return (module for module in outside_adapter_dicts(model) if isinstance(module, AdapterDict))


def hosts_of(model: nn.Module) -> Iterator[AdapterLayer | AuxiliaryTrainingWrapper]:
    """What holds adapters by name: petl's own layers, and heads."""
    kinds = AdapterLayer | AuxiliaryTrainingWrapper
    return (module for module in outside_adapter_dicts(model) if isinstance(module, kinds))


def layers_of(model: nn.Module) -> Iterator[AdapterLayer]:
    """The adapter layers of a model, without a look at their adapters."""
    return (host for host in hosts_of(model) if isinstance(host, AdapterLayer))


class SwitchingModel(SwappedClass, PeftModel):
    """Mixed into the class of a PeftModel that has a `SwitchingTuner`.

    PEFT's `disable_adapter` first reports on all adapters, and its `load_adapter` lists the tensors
    of all of them several times.
    """

    @property
    def _tuner(self) -> SwitchingTuner:
        return cast(SwitchingTuner, self.base_model)

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Within it, the model computes as the base model does."""
        with self._tuner.entering(super().disable_adapter(), self._tuner.in_use()):
            yield

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a trained adapter beside those that are there; see `PeftModel.load_adapter`."""
        with self._tuner.only_visible({adapter_name}):
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)


def enable_switching(model: PeftModel) -> None:
    """Let a model with a `SwitchingTuner` disable and load at the cost of adapters concerned."""
    if isinstance(model.base_model, SwitchingTuner):
        swap_class(model, SwitchingModel)


class NoMixedBatches:
    """Stands in for a tuner's hooks of a forward pass, which would let `adapter_names` drop."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @contextmanager
    def __call__(self, *args: Any, **kwargs: Any) -> Generator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(f"adapter_names is not possible: {self.reason}")
        yield


def refuse_mixed_batches(model: PeftModel, reason: str) -> None:
    """Have `model` raise UnsupportedError for `adapter_names` instead of passing over it."""
    tuner: Any = model.base_model
    tuner._enable_peft_forward_hooks = NoMixedBatches(reason)
