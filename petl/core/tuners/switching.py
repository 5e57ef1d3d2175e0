"""Add, switch and delete adapters in time that does not grow with the number of adapters.

PEFT walks over all modules of a model for this, those of idle adapters included, and over all
adapters of each layer: with N adapters a switch takes N times as long as with one, and adding all
of them N^2 times. Here idle adapters are hidden from that walk (see `AdapterDict`). Look-up by name
still finds all of them, so forward passes work at any time, in other threads too.
"""

import inspect
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pkgutil import resolve_name
from threading import RLock
from typing import Any, Self, TypeVar, cast

from peft import PeftConfig, PeftModel
from torch import nn

from petl.core.compat import (
    AdaLoraModel,
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    LoraModel,
    ModulesToSaveWrapper,
    extend_method,
    freeze_ranks,
)
from petl.core.layers.class_swap import (
    AdapterDict,
    SwappedClass,
    adapter_dicts_of,
    convert_module_dicts,
    outside_adapter_dicts,
    restore_class,
    restore_module_dict,
    swap_class,
)
from petl.core.layers.layer import AdapterLayer
from petl.core.layers.mixed_batch import AdapterRows, KeptRows
from petl.core.layers.norms import TrainedNorm
from petl.core.layers.task_rows import ARGUMENT, PASSED, pass_task_ids
from petl.core.parameters import is_norm, refuse_shared_targets
from petl.core.spec.checks import check_adapter_name
from petl.core.spec.facts import facts_of
from petl.errors import UnsupportedError

# one thread hides entries at a time; one lock for all tuners, since a lock cannot be copied or
# pickled with its tuner
LOCK = RLock()
CHECKED = "petl_checks_merging"  # attribute of a tuner
HOSTS = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # hold adapters, or heads that train with them
M = TypeVar("M", bound=nn.Module)


class SwitchingTuner(BaseTuner):
    """Mixin for a tuner that hides idle adapters in `AdapterDict`s while PEFT walks over the model.

    It comes before the tuner class in the bases. Layers whose adapters are not in an `AdapterDict`
    work as in PEFT, which visits all of their adapters.

    Attributes:
        extra_trainable: adapters that train although they may not be active, by
            `set_requires_grad`. These and the active ones are all that a switch sets: parameters
            of another adapter whose `requires_grad` was set by hand keep it.
        newly_added: adapters that were added in evaluation mode but are in training mode
            themselves, since PEFT does not set the mode of an added adapter.
    """

    extra_trainable: set[str]
    newly_added: set[str]
    _is_restricted = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.extra_trainable, self.newly_added = set(), set()
        super().__init__(*args, **kwargs)

    @contextmanager
    def only_visible(self, names: Collection[str]) -> Generator[None]:
        """Hide all other adapters, in the block, from traversal, from `state_dict` and from PEFT.

        Adapters that are added in the block are visible. A nested block has no effect.
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
        self, context: AbstractContextManager[object], names: Collection[str]
    ) -> Generator[None]:
        """Enter `context` while only these adapters are visible, then run the block with all."""
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
            check_adapter_name(adapter_name, model, type(self))
            # to restore below
            trained = [(p, p.requires_grad) for p in _active_heads(model)]
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            # PEFT has frozen the heads of hidden adapters, too
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            self.convert_layers()
        # after a deletion, adapters may be active on single layers only; no longer, but they train
        self.extra_trainable |= before - set(self.active_adapters)
        if not self.training:
            self.newly_added.add(adapter_name)

    def convert_layers(self) -> None:
        """Convert the ModuleDicts that PEFT has put in the model: heads that train with adapters.

        A subclass converts those of its layers as well.
        """
        for head in _heads(self.model):
            convert_module_dicts(head)
            if is_norm(head):
                swap_class(head, TrainedNorm)

    def restore_layers(self) -> None:
        """Undo `convert_layers`, and forget what a switch needs to know."""
        for adapter_dict in list(adapter_dicts_of(self)):
            restore_module_dict(adapter_dict)
        for head in _heads(self.model):
            restore_class(head, TrainedNorm)
        for name in ("extra_trainable", "newly_added", "_is_restricted", "kept_rows"):
            self.__dict__.pop(name, None)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, of hidden adapters too."""
        if mode:
            self._forget_rows()
        with LOCK:
            changes = self.training != mode or self.model.training != mode
            super().train(mode)
            if self._is_restricted:
                for adapter_dict in adapter_dicts_of(self):
                    # if the mode stays, only adapters added since can differ from it
                    for name in adapter_dict if changes else self.newly_added & adapter_dict.keys():
                        adapter_dict[name].train(mode)
            # all adapters are in the tuner's mode now
            self.newly_added.clear()
        return self

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with self.only_visible({adapter_name}):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters; only they train, and none if `inference_mode`."""
        with LOCK:
            if self._is_restricted:  # while an adapter is added: how others train does not change
                super().set_adapter(adapter_name, inference_mode)
                return
            # the new ones to activate, the old ones to deactivate
            with self.only_visible({*_names(adapter_name), *self.in_use()}):
                super().set_adapter(adapter_name, inference_mode)
            self._forget_frozen()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Make these adapters trainable, or freeze them, whether they are active or not."""
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
        """Delete an adapter; on layers without an active one then, PEFT activates another."""
        self._forget_rows()
        in_use = self.in_use()
        fallbacks = self._fallbacks(adapter_name) if adapter_name in in_use else set()
        with self.only_visible({adapter_name, *in_use, *fallbacks}):
            super().delete_adapter(adapter_name)
        self.extra_trainable.discard(adapter_name)
        self.newly_added.discard(adapter_name)

    @cached_property
    def kept_rows(self) -> KeptRows:
        """Stacked weights of the last mixed batch that was generated."""
        return KeptRows()

    def _forget_rows(self) -> None:
        if "kept_rows" in self.__dict__:  # some were generated
            self.kept_rows.forget()

    def rows_of(self, names: Sequence[str], *, is_generation_call: bool) -> AdapterRows:
        """Return the rows of a call with `adapter_names`; see `KeptRows`."""
        # of petl's methods, the tensors that layers share are in an AdapterDict of the tuner
        shared = [m for m in self.children() if isinstance(m, AdapterDict)]
        hosts = (m for m in outside_adapter_dicts(self.model) if isinstance(m, BaseTunerLayer))
        return self.kept_rows.of((*hosts, *shared), names, is_generation_call=is_generation_call)

    def in_use(self) -> set[str]:
        """Return the adapters that are active on some layer, and `extra_trainable`."""
        hosts = (
            module for module in outside_adapter_dicts(self.model) if isinstance(module, HOSTS)
        )
        return {*self.extra_trainable, *(name for host in hosts for name in host.active_adapters)}

    def _fallbacks(self, adapter_name: str) -> set[str]:
        """Return the adapters that PEFT activates on layers that lose their only active one.

        On each layer that is the first remaining name in alphabetical order.
        """
        layers = (m for m in outside_adapter_dicts(self.model) if isinstance(m, BaseTunerLayer))
        # layers of the other adapters keep theirs
        lost = (layer for layer in layers if layer.active_adapters == [adapter_name])
        left = ({*layer._all_available_adapter_names()} - {adapter_name} for layer in lost)
        return {min(names) for names in left if names}

    def _forget_frozen(self) -> None:
        """Remove adapters from `extra_trainable` that PEFT has frozen.

        PEFT freezes adapters in layers but not always those in heads, so parameters are checked.
        """
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
    """Return True if any parameter of the module requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _heads(model: nn.Module) -> Iterator[ModulesToSaveWrapper]:
    return (m for m in outside_adapter_dicts(model) if isinstance(m, ModulesToSaveWrapper))


def _active_heads(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the heads of active adapters."""
    for head in _heads(model):
        for name in head.active_adapters:
            yield from head.modules_to_save[name].parameters()


def _names(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def hosts_of(model: nn.Module) -> Iterator[AdapterLayer | AuxiliaryTrainingWrapper]:
    """Yield the modules that hold adapters by name: petl's adapter layers, and trained heads."""
    types = AdapterLayer | AuxiliaryTrainingWrapper
    return (module for module in outside_adapter_dicts(model) if isinstance(module, types))


def layers_of(model: nn.Module) -> Iterator[AdapterLayer]:
    """Yield the adapter layers of a model, in time that does not grow with their adapters."""
    return (host for host in hosts_of(model) if isinstance(host, AdapterLayer))


class SwitchingModel(SwappedClass, PeftModel):
    """Mixin for the class of a PeftModel that has a `SwitchingTuner`.

    PEFT's `disable_adapter` checks the status of all adapters first, its `load_adapter` lists the
    tensors of all of them several times, and its `save_pretrained` also compares the name of each
    tensor with that of each adapter.
    """

    @property
    def _tuner(self) -> SwitchingTuner:
        return cast(SwitchingTuner, self.base_model)

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Disable all adapters in the block; the model computes as its base model."""
        with self._tuner.entering(super().disable_adapter(), self._tuner.in_use()):
            yield

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> object:
        """Load a trained adapter in addition to those present; see `PeftModel.load_adapter`."""
        with self._tuner.only_visible({adapter_name}):
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: object,
    ) -> None:
        """Save these adapters, or all; see `PeftModel.save_pretrained`."""
        start, known = path_initial_model_for_weight_conversion, self.peft_config
        names = list(known) if selected_adapters is None else selected_adapters
        # PEFT names the unknown adapter; from a state dict of the caller it takes out the others by
        # their names; and a conversion adds an adapter
        if not known.keys() >= set(names) or kwargs.get("state_dict") is not None or start:
            super().save_pretrained(
                save_directory,
                safe_serialization,
                selected_adapters,
                save_embedding_layers,
                is_main_process,
                start,
                **kwargs,
            )
            return
        for name in names:
            with self._tuner.only_visible({name}):
                super(SwitchingModel, self._listing(name)).save_pretrained(
                    save_directory,
                    safe_serialization,
                    [name],
                    save_embedding_layers,
                    is_main_process,
                    **kwargs,
                )

    def _listing(self, adapter_name: str) -> Self:
        """Return a view of this model that lists this adapter, the active ones, and a few more.

        These cannot be hidden. Modules are shared; the model itself is not changed, since other
        threads may compute with any adapter meanwhile.
        """
        # PEFT has adapters of embeddings in dicts of bare parameters
        visible = {
            name
            for module in outside_adapter_dicts(self)
            if isinstance(module, nn.ModuleDict | nn.ParameterDict)
            and not isinstance(module, AdapterDict)
            for name in module
        }
        visible |= {adapter_name, *self.active_adapters}
        tuner, view = _view(self._tuner), _view(self)
        tuner.peft_config = {
            name: config for name, config in self.peft_config.items() if name in visible
        }
        view._modules = {**self._modules, "base_model": tuner}
        return view


def _view(module: M) -> M:
    """Return a second object with the attributes of a module; setting one leaves the module as is.

    `copy` would make it by the class, and that of a module sharded by `fully_shard` calls
    `__init__`.
    """
    view = object.__new__(type(module))
    vars(view).update(vars(module))
    return view


def only_visible(model: PeftModel, names: Collection[str]) -> AbstractContextManager[None]:
    """Return a context in which a `SwitchingTuner` hides all other adapters; other tuners: none."""
    tuner: nn.Module = model.base_model
    return tuner.only_visible(names) if isinstance(tuner, SwitchingTuner) else nullcontext()


def enable_switching(model: PeftModel) -> None:
    """Swap the class of a model with a `SwitchingTuner` for one with `SwitchingModel`.

    A model whose method `takes_task_ids` takes them, whatever its class in PEFT.
    """
    if isinstance(model.base_model, SwitchingTuner):
        swap_class(model, SwitchingModel)
    # on the class: PEFT tuners pass unknown attributes to the base model
    method = getattr(type(model.base_model), "method", None)
    if method is not None and method.takes_task_ids:
        model.register_forward_pre_hook(pass_task_ids, with_kwargs=True)
        # not for the base model: the tuner reads them in `_enable_peft_forward_hooks`
        model.special_peft_forward_args |= {ARGUMENT, PASSED}


class CheckedSum:
    """Replacement of `add_weighted_adapter` of LoRA tuners that raises if PEFT's sum is wrong."""

    def __init__(self, tuner: LoraModel) -> None:
        self.tuner = weakref.ref(tuner)  # a cycle would keep a deleted model in memory

    def __reduce__(self) -> tuple[type, tuple[BaseTuner | None]]:
        return type(self), (self.tuner(),)

    def __call__(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        tuner: Any = self.tuner()
        for name in adapters:
            reason = _not_combined(tuner.peft_config.get(name))
            if reason:
                raise UnsupportedError(
                    f"add_weighted_adapter is not possible with {name!r}: {reason}"
                )
        LoraModel.add_weighted_adapter(tuner, adapters, *args, **kwargs)


def _merge(
    original: Callable[..., object],
    tuner: BaseTuner,
    *args: object,
    lossy: bool = False,
    **kwargs: object,
) -> object:
    """Merge as PEFT does, or refuse a wrong result in a model that petl has wrapped or loaded.

    Args:
        lossy: merge even if rounding removes much of the update.
    """
    if CHECKED in vars(tuner):
        given = inspect.signature(original).bind(tuner, *args, **kwargs).arguments
        tuner._check_merge_allowed()
        refuse_shared_targets(tuner.model)
        if not lossy:
            refuse_rounding = resolve_name("petl.core.model.rounding:refuse_rounding")
            refuse_rounding(tuner.model, given.get("adapter_names"))
    return original(tuner, *args, **kwargs)


for _name in ("merge_adapter", "merge_and_unload"):
    extend_method(BaseTuner, _name, _merge)


class WithoutPenalty:
    """Replacement of the `forward` of AdaLoRA: PEFT's adds the penalty of an adapter that trains.

    It fails on labels if there is none, as in a model that was loaded.
    """

    def __init__(self, tuner: BaseTuner) -> None:
        self.tuner = weakref.ref(tuner)

    def __reduce__(self) -> tuple[type, tuple[BaseTuner | None]]:
        return type(self), (self.tuner(),)

    def __call__(self, *args: object, **kwargs: object) -> object:
        tuner: Any = self.tuner()
        if "trainable_adapter_name" in vars(tuner):
            return type(tuner).forward(tuner, *args, **kwargs)
        return tuner.model.forward(*args, **kwargs)


class NoMixedBatches:
    """Replacement of a tuner's forward hooks that raises on `adapter_names`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @contextmanager
    def __call__(self, *args: object, **kwargs: object) -> Generator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(f"adapter_names is not possible: {self.reason}")
        yield


def refuse_mixed_batches(model: PeftModel, reason: str) -> None:
    """Make `model` raise UnsupportedError for `adapter_names`, which its tuner would ignore."""
    tuner: Any = model.base_model
    # an instance attribute, which shadows the tuner's method
    tuner._enable_peft_forward_hooks = NoMixedBatches(reason)


def apply_peft_fixes(model: PeftModel, not_mixed: str) -> None:
    """Apply fixes for PEFT to a model that it has wrapped or loaded.

    Freeze AdaLoRA's rank counters, and let one that does not train take labels; raise on
    `adapter_names` where the tuner ignores it, on `add_weighted_adapter` where it computes another
    sum, and on merging where that changes a tied weight or rounds the update off.

    Args:
        not_mixed: why the method of its adapters lacks `Capability.MIXED_BATCH`; "": it has it.
    """
    freeze_ranks(model.base_model)
    if not_mixed:
        refuse_mixed_batches(model, not_mixed)
    tuner: Any = model.base_model
    # of PEFT's LoRA, not of its subclasses that replace the method
    if getattr(type(tuner), "add_weighted_adapter", None) is LoraModel.add_weighted_adapter:
        # an instance attribute, as that of `refuse_mixed_batches`
        tuner.add_weighted_adapter = CheckedSum(tuner)
    vars(tuner)[CHECKED] = True
    # its forward calls that of the model directly, past its hooks, and adds a penalty to the loss
    if isinstance(tuner, AdaLoraModel):
        tuner.forward = WithoutPenalty(tuner)


def _not_combined(config: PeftConfig) -> str:
    """Return why PEFT's LoRA cannot add adapters of this config; "": it can."""
    if facts_of(config).use_rslora:
        return "PEFT scales the sum of rsLoRA adapters by the root of its rank once more"
    if facts_of(config).use_dora:
        return "PEFT ignores the magnitudes of DoRA, and a sum of DoRA's updates is no DoRA"
    for field in ("lora_bias", "trainable_token_indices", "modules_to_save"):
        value = getattr(facts_of(config), field)
        if value:
            return (
                f"it has {field}={value}, and PEFT's sum has the factors alone: what else was "
                "trained would be lost; combine the saved adapters by petl combine"
            )
    return ""
