"""AskingTuner, a mixin for tuners of PEFT that asks a `Method` what happens to its adapters."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.compat import tuner_of_type
from petl.core.layers.block import BlockAdapters
from petl.core.layers.layer import Adapter
from petl.core.method import AdapterSet, Method, NewAdapters, Tensors, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap
from petl.core.model.weight_changes import CHANGES, change_map
from petl.core.support import Capability, reason_of
from petl.core.switching.tuner import SwitchingTuner, layers_of
from petl.core.tuners.base import ForwardContextTuner, check_loaded, updated, watch
from petl.errors import InputError, UnsupportedError


class AskingTuner(SwitchingTuner, ForwardContextTuner):
    """Mixin that comes before a tuner of PEFT, and asks the `method` of the class.

    PEFT knows one class for a type. Where the method has a `variant` for the fields of a config,
    its instances have the class that is generated for that.

    Attributes:
        method: what it asks.
        kept: what the method remembers of this model, under keys of its own.
        placed: by adapter name and module path, the adapters in the model's order; without those of
            PEFT's own layers.
    """

    method: ClassVar[Method[Any, Any]]

    def __new__(
        cls, model: Any = None, peft_config: Any = None, adapter_name: str = "", **options: Any
    ) -> Any:
        """Return an object of the class for the config; of this one if a copy is made."""
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        return super().__new__(cls if config is None else cls.for_fields(vars(config)))

    @classmethod
    def for_fields(cls, fields: Mapping[str, Any]) -> "type[AskingTuner]":
        """Return the class of the method's variant for these fields of a config."""
        variant = cls.method.variant(fields)
        return cls if variant is cls.method else variant.tuner

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a generated class cannot be imported by name
        method = self.method
        of_class = f"PETL_{method.name.upper()}", method.inner or None
        return _without_state, of_class, self.__getstate__()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept: dict[Any, Any] = {}
        self.placed: dict[str, dict[str, Adapter]] = {}
        super().__init__(*args, **kwargs)

    def adapter_set(self, adapter_name: str) -> AdapterSet[Any, Any]:
        """Return the adapters called `adapter_name`."""
        placed, config = self.placed.get(adapter_name, {}), self.peft_config[adapter_name]
        return AdapterSet(self.model, adapter_name, config, placed, self, self.kept)

    @classmethod
    def _set_in(
        cls, model: nn.Module, adapter_name: str, config: Any, state: Tensors
    ) -> AdapterSet[Any, Any]:
        is_wrapped = isinstance(model, PeftModel)
        base: Any = model.get_base_model() if is_wrapped else model
        tuner: Any = model.base_model if is_wrapped else None
        # beside those of an inner method there may be others
        layers = (layer for layer in layers_of(base) if layer.slot == f"{cls.prefix}adapters")
        picked = (adapter for layer in layers for _, adapter in layer.pick([adapter_name]))
        placed = {adapter.info.key: adapter for adapter in picked}
        kept = tuner.kept if is_wrapped else {}
        return AdapterSet(base, adapter_name, config, placed, tuner, kept, state)

    # Adapters: add, activate, delete

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Inject an adapter with PEFT, then let the method complete it.

        Raises:
            InputError: the method refuses the model, or adapters of another inner method have been
                injected; the model is left unchanged.
        """
        method, configs = self.method, cast(dict[str, Any], self.peft_config)
        config = configs[adapter_name]
        others = {each.inner for each in configs.values()} if method.has_inner else set()
        if len(others) > 1:
            raise InputError(
                f"inner={config.inner!r} cannot be added to a model with an adapter of inner="
                f"{next(iter(others - {config.inner}))!r}; wrap another copy of the model"
            )
        if method.needs_tuner:
            self.refuse_without_tuner(method.needs_tuner)
        if method.updates and not config.inference_mode:
            self.refuse_without_tuner("it changes its adapters while they train")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        c = WrapContext(model, config, adapter_name)
        with self.only_visible({adapter_name}), self._injection(c, low_cpu_mem_usage):
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )
            found = vars(self.adapter_set(adapter_name))
            of_model = {"context": self.context, "hooks": self.hooks, "placed": self.placed}
            try:
                method.added(NewAdapters(**found, **of_model))
            except InputError:
                self._take_back(adapter_name, trained)
                raise
        if method.updates:
            watch(self)

    @contextmanager
    def _injection(self, c: WrapContext[Any], low_cpu_mem_usage: bool) -> Generator[None]:
        """Let the method check the model; PEFT injects the adapter in the block."""
        self.method.settings(c)
        yield

    def _take_back(self, adapter_name: str, trained: Iterable[nn.Parameter]) -> None:
        """Remove an adapter that the method refuses; `trained` is what was trainable before."""
        self.delete_adapter(adapter_name)
        if not self.peft_config:
            self.unload()
        for parameter in trained:
            parameter.requires_grad_(True)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters, if the method allows them together.

        Raises:
            UnsupportedError: they cannot be active together.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.refuse_together(names)
        idle = set(self.active_adapters) - set(names) if self.method.overrides("released") else ()
        super().set_adapter(adapter_name, inference_mode)
        for name in idle:
            if name in self.peft_config:
                self.method.released(self.adapter_set(name))

    def refuse_together(self, names: Sequence[str]) -> None:
        """Raise UnsupportedError if adapters of these names cannot be active together."""
        configs = [self.peft_config[name] for name in names if name in self.peft_config]
        reason = self.method.joins(configs) if len(configs) > 1 else ""
        if reason:
            raise UnsupportedError(
                f"adapters {', '.join(names)} cannot be active together: {reason}"
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what the method did for it."""
        old = self.adapter_set(adapter_name) if adapter_name in self.peft_config else None
        super().delete_adapter(adapter_name)  # PEFT raises for an unknown name
        self.placed.pop(adapter_name, None)
        if old is not None:
            self.method.removed(old)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        autocast = autocast_adapter_dtype or self.method.keep_float32
        super()._cast_adapter_dtype(adapter_name, autocast)

    # Merging, unloading

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        config: Any = self.peft_config[self.active_adapters[0]]
        reason = reason_of(self.method.lacks, Capability.MERGE, config)
        if reason:
            raise UnsupportedError(reason)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, BlockAdapters):
            child.detach()
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        sets = [] if merge else [self.adapter_set(name) for name in self.peft_config]
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for old in sets:
            self.method.removed(old)
        return model

    # Training, for `Lifecycle` and for loops in PEFT's manner

    def context_of_training(self, **more: Any) -> TrainContext[Any, Any]:
        """Return what the method's hooks get; `more` are further fields of it."""
        known = [name for name in self.active_adapters if name in self.peft_config]
        active = [self.adapter_set(name) for name in known]
        return TrainContext(self.model, active, self.context, self.kept, **more)

    def update_and_allocate(self, step: int, optimizer: Optimizer | None = None) -> None:
        """Let the method change its adapters; call it after `optimizer.step()`.

        Args:
            step: completed optimizer steps, from 1.
            optimizer: that of the training, or a wrapper of it.
        """
        updated(self)
        if self.method.updates:
            self.method.after_step(self.context_of_training(step=step, optimizer=optimizer))
        # of PEFT's AdaLoRA as an inner method, which counts from 0
        allocate = getattr(super(), "update_and_allocate", None)
        if allocate is not None:
            allocate(step - 1)

    @property
    def needs_updates(self) -> bool:
        """True if `update_and_allocate` has something to do for the active adapters."""
        return self.method.updates and not self.method.is_idle(self.context_of_training())

    def prepare(self, batches: Iterable[Any]) -> None:
        """Use training batches once, before the optimizer exists."""
        self.method.prepare(self.context_of_training(batches=batches))

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """Return the optimizer that the method requires, over these parameter groups, or None."""
        return self.method.optimizer(self.context_of_training(groups=groups))

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Begin, or resume, a training.

        Args:
            optimizer: a torch optimizer, or a wrapper that has one as `optimizer`.
            start_step: optimizer steps already done, in a resumed run.
            first: the step number that `update_and_allocate` gets after the first step of a run: 0
                in PEFT's loops, 1 in petl's lifecycle.
            total_steps: length of the run, for a method whose config does not have it.
        """
        more = {"optimizer": optimizer, "step": start_step, "first": first, "total": total_steps}
        self.method.begin(self.context_of_training(**more))

    def learning_rate_of(self, name: str) -> float | None:
        """Return the peak learning rate that the method sets for a parameter; None: that of all."""
        sets = self.method.overrides("rate")
        return self.method.rate(self.context_of_training(), name) if sets else None

    def training_state(self) -> Tensors:
        """Return the state that exact resumption needs and the adapter file does not have."""
        return self.method.state(self.context_of_training())

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `training_state` returned."""
        self.method.load_state(self.context_of_training(), state)

    # Results

    def planned_parameters(self) -> int | None:
        """Return the number of parameters of the trained adapter; None: those that train now."""
        return self.method.planned(self.context_of_training())

    def series(self) -> dict[str, float]:
        """Return metrics of the last training forward for the log."""
        return self.method.metrics(self.context_of_training())

    def figures(self) -> dict[str, float]:
        """Return figures of the trained adapter for scores.json, such as its share of zeros."""
        return self.method.figures(self.context_of_training())

    def heat_maps(self) -> list[HeatMap]:
        """Return maps of what the method did, for the folder of a run."""
        maps = self.method.heat_maps(self.context_of_training())
        changes = self.method.adapter_cls is None or Capability.MERGE not in self.method.lacks
        if changes and CHANGES not in {each.name for each in maps}:
            maps = [*maps, *change_map(self.model, self.active_adapters)]
        return maps

    # Files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: Tensors,
        unwanted_adapter_names: list[str],
    ) -> Tensors:
        """Select the tensors to save, in the form of the method's files."""
        own: Any = cls.for_fields(vars(config))
        tensors = super(AskingTuner, own)._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return own.method.pack(own._set_in(model, adapter_name, config, state_dict), tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Tensors
    ) -> Tensors:
        """Return the tensors of a file under the model's names.

        Raises:
            InputError: tensors are missing or unexpected, or differ from the model's in shape or
                kind of dtype; values are not finite, or a table has values that it cannot have.
        """
        own: Any = cls.for_fields(vars(config))
        found = own._set_in(model, adapter_name, config, {})
        tensors = super(AskingTuner, own)._remap_adapter_state_dict_for_load(
            model, config, adapter_name, own.method.unpack(found, dict(state_dict))
        )
        layers = [layer for layer in layers_of(found.model) if adapter_name in layer.adapters]
        for prefix in {layer.slot.removesuffix("adapters") for layer in layers}:
            check_loaded(model, adapter_name, tensors, prefix, own.method.free_dims)
        return tensors

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            "path_initial_model_for_weight_conversion works for PEFT's LoRA only; leave it out: "
            "adapters of petl's methods are saved relative to the original weights"
        )


def _without_state(peft_type: str, inner: str | None) -> AskingTuner:
    """Return a tuner, which pickle and copy then fill in."""
    cls: Any = tuner_of_type(peft_type).for_fields({"inner": inner})
    return cls.__new__(cls)


DEFAULTS: Method[Any, Any] = Method()


def method_asked(tuner: type[Any]) -> Method[Any, Any]:
    """Return the method that a tuner asks; of PEFT's own tuners, one with all defaults."""
    return tuner.method if issubclass(tuner, AskingTuner) else DEFAULTS
