"""AskingTuner, a mixin for tuners of PEFT that asks a `Method` what happens to its adapters."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn, cast

from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from petl.core.compat import BaseTuner, drop_base_weights, tuner_of
from petl.core.experts.linears import split_experts, stack_experts, without_adapter
from petl.core.layers.block import BlockAdapters
from petl.core.layers.class_swap import AdapterDict
from petl.core.layers.context import ForwardContext
from petl.core.layers.layer import Adapter
from petl.core.layers.wrappers import Fsdp1Check, refuse_replica
from petl.core.method import AdapterSet, C, Method, NewAdapters, Tensors, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap
from petl.core.model.weight_changes import CHANGES, change_map
from petl.core.support import Capability, Part, reason_of
from petl.core.tuners.gradients import updated, watch_updates
from petl.core.tuners.switching import SwitchingTuner, layers_of
from petl.errors import InputError, UnsupportedError
from petl.system.files.tensor_file import check_finite, check_shapes


class AskingTuner(SwitchingTuner):
    """Mixin that comes before a tuner of PEFT, and asks the `method` of the class.

    PEFT knows one class for a type. Where the method has a `variant` for the fields of a config,
    its instances have the class that is generated for that.

    Attributes:
        method: what it asks.
        kept: what the method remembers of this model, under keys of its own.
        placed: by adapter name and module path, the adapters in the model's order; without those of
            PEFT's own layers.
        context: state that the layers share during a forward pass; hooks of the model update it.
        hooks: handles of hooks; removed if the first adapter is refused, and by unloading.
        is_kept: False if only the model is kept after the first adapter is injected, as PEFT's
            `inject_adapter_in_model` does, and with it `load_adapter` of transformers.
    """

    method: ClassVar[Method[Any, Any]]
    context: ForwardContext

    def __new__(
        cls, model: object = None, peft_config=None, adapter_name: str = "", **options: object
    ) -> Any:
        """Return an object of the class for the config; of this one if a copy is made."""
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        return super().__new__(cls if config is None else cls.for_fields(vars(config)))

    @classmethod
    def for_fields(cls, fields: Mapping[str, object]) -> "type[AskingTuner]":
        """Return the class of the method's variant for these fields of a config."""
        variant = cls.method.variant(fields)
        return cls if variant is cls.method else variant.tuner

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        # a generated class cannot be imported by name
        method = self.method
        of_class = f"PETL_{method.name.upper()}", method.inner or None
        return _without_state, of_class, self.__getstate__()

    def __init__(self, model: object, peft_config: object, *args: object, **kwargs: object) -> None:
        # before `super().__init__`, which injects the first adapter
        self.kept: dict[object, object] = {}
        self.placed: dict[str, dict[str, Adapter]] = {}
        self.hooks: list[RemovableHandle] = []
        self.is_kept = isinstance(peft_config, dict)  # as PeftModel calls its tuner
        try:
            super().__init__(model, peft_config, *args, **kwargs)
        except Exception:
            self._remove_hooks()  # the model must be unchanged if its adapter is refused
            raise

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        # PEFT calls this hook once per tuner, before the first adapter is injected
        self.context = ForwardContext()
        self.hooks += [
            model.register_forward_pre_hook(refuse_replica),
            model.register_forward_pre_hook(Fsdp1Check(self.chosen)),
            model.register_forward_pre_hook(self.context.begin, with_kwargs=True),
            model.register_forward_hook(self.context.end, with_kwargs=True),
        ]

    def chosen(self, model: nn.Module) -> list[Part]:
        """Return the method, with the config of each adapter, as parts of a choice."""
        return [self.method.part(config) for config in self.peft_config.values()]

    def _remove_hooks(self) -> None:
        for handle in self.hooks:
            handle.remove()

    def refuse_without_tuner(self, why: str) -> None:
        """Raise UnsupportedError, with the reason `why`, if the tuner is not kept."""
        if not self.is_kept:
            raise UnsupportedError(
                f"an adapter of {type(self).__name__} cannot be injected without a PeftModel: "
                f"{why}; load it with peft.PeftModel.from_pretrained or petl.load, train it with "
                "petl.wrap"
            )

    def adapter_set(self, adapter_name: str) -> AdapterSet[PeftConfig, Adapter]:
        """Return the adapters called `adapter_name`."""
        placed, config = self.placed.get(adapter_name, {}), self.peft_config[adapter_name]
        return AdapterSet(self.model, adapter_name, config, placed, self, self.kept)

    @classmethod
    def _set_in(
        cls, model: nn.Module, adapter_name: str, config: PeftConfig, state: Tensors
    ) -> AdapterSet[PeftConfig, Adapter]:
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
        c = WrapContext(model, config, adapter_name)
        with self.only_visible({adapter_name}), self._injection(c, low_cpu_mem_usage):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
            watch_updates(self)

    @contextmanager
    def _injection(self, c: WrapContext[C], low_cpu_mem_usage: bool) -> Generator[None]:
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
        """Delete an adapter from all layers, those of blocks included, and what it left."""
        old = self.adapter_set(adapter_name) if adapter_name in self.peft_config else None
        # PEFT skips modules whose path has the tuner's prefix: contents of its layers, but also
        # `BlockAdapters`, a layer of that name
        vars(self)["prefix"] = "\n"  # in no path; shadows the class attribute
        try:
            super().delete_adapter(adapter_name)  # raises for an unknown name
        finally:
            del vars(self)["prefix"]
        self.placed.pop(adapter_name, None)
        if old is not None:
            self.method.removed(old)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        autocast = autocast_adapter_dtype or self.method.keep_float32
        super()._cast_adapter_dtype(adapter_name, autocast)

    # Merging, unloading

    def add_weighted_adapter(self, *args: object, **kwargs: object) -> None:
        """Raise UnsupportedError: a sum of adapters is in general none of the same kind."""
        raise UnsupportedError(
            "add_weighted_adapter works for PEFT's LoRA only: export each adapter as a LoRA (petl "
            "export --lora), where its method can, and combine those"
        )

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        config = self.peft_config[self.active_adapters[0]]
        reason = reason_of(self.method.lacks, Capability.MERGE, config)
        if reason:
            raise UnsupportedError(reason)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, BlockAdapters):
            child.detach()
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        sets = [] if merge else [self.adapter_set(name) for name in self.peft_config]
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for old in sets:
            self.method.removed(old)
        self._remove_hooks()
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

    # Results

    def planned_parameters(self) -> int | None:
        """Return the number of parameters of the trained adapter; None: those that train now."""
        return self.method.planned(self.context_of_training())

    def series(self) -> dict[str, float]:
        """Return metrics of the last training forward for the log."""
        return self.method.metrics(self.context_of_training())

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
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: Tensors,
        unwanted_adapter_names: list[str],
    ) -> Tensors:
        """Select the tensors to save, in the form of the method's files.

        The weights under adapted layers are never among them.
        """
        own = cls.for_fields(vars(config))
        tensors = super(AskingTuner, own)._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        drop_base_weights(model, state_dict)
        found = own._set_in(model, adapter_name, config, state_dict)
        return stack_experts(own.method.pack(found, tensors), own.method.free_dims)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        stacked = without_adapter(key, adapter_name)
        return (
            super()._remove_adapter_name_from_key(key, adapter_name) if stacked is None else stacked
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: Tensors
    ) -> Tensors:
        """Return the tensors of a file under the model's names.

        Raises:
            InputError: tensors are missing or unexpected, or differ from the model's in shape or
                kind of dtype; values are not finite, or a table has values that it cannot have.
        """
        own = cls.for_fields(vars(config))
        found = own._set_in(model, adapter_name, config, {})
        tensors = super(AskingTuner, own)._remap_adapter_state_dict_for_load(
            model, config, adapter_name, own.method.unpack(found, split_experts(state_dict))
        )
        layers = [layer for layer in layers_of(found.model) if adapter_name in layer.adapters]
        for prefix in {layer.slot.removesuffix("adapters") for layer in layers}:
            check_loaded(model, adapter_name, tensors, prefix, own.method.free_dims)
        return tensors

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: object, **kwargs: object) -> NoReturn:
        raise UnsupportedError(
            "path_initial_model_for_weight_conversion works for PEFT's LoRA only; leave it out: "
            "adapters of petl's methods are saved relative to the original weights"
        )


def _without_state(peft_type: str, inner: str | None) -> AskingTuner:
    """Return a tuner, which pickle and copy then fill in."""
    cls = tuner_of(peft_type).for_fields({"inner": inner})
    return cls.__new__(cls)


def check_loaded(
    model: nn.Module,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    prefix: str,
    free_dims: Mapping[str, int],
) -> None:
    """Raise InputError unless the tensors of a file fit the adapters of one prefix in a model.

    Args:
        model: the model, with the adapter called `adapter_name`.
        tensors: by the model's names; those of other methods are not checked.
        prefix: of the method, such as "petl_mola_".
        free_dims: see `Method`.
    """
    marks = (f".{prefix}adapters.", f".{prefix}pools.")
    # model keys have the adapter's name, which PEFT has already inserted into the remapped ones
    tail = f".{adapter_name}."
    own = {k: t for k, t in model.state_dict().items() if any(m[:-1] + tail in k for m in marks)}
    saved = {k: t for k, t in tensors.items() if any(m in k for m in marks)}
    found, expected = ({k: (t.dtype, t.shape) for k, t in d.items()} for d in (saved, own))
    check_shapes(found, expected, {}, free_dims, "the adapter file")
    check_finite(saved, "the adapter file")
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        path, _, name = key.partition(f"{marks[0]}{adapter_name}.")
        by_layer.setdefault(path, {})[name] = tensor
    modules = dict(model.named_modules())
    for path, own_tensors in by_layer.items():
        adapters = modules.get(f"{path}{marks[0][:-1]}")
        if isinstance(adapters, AdapterDict):
            cast(Adapter, adapters[adapter_name]).check_saved(own_tensors)


DEFAULTS: Method[PeftConfig, Adapter] = Method()


def computes_by_position(model: PeftModel) -> bool:
    """Return True if the adapters of a model change each position by itself."""
    tuner = model.base_model
    # PEFT's tuners adapt single layers; what is not a tuner adds positions (prompts)
    of_peft = isinstance(tuner, BaseTuner) and not isinstance(tuner, AskingTuner)
    said = method_asked(type(tuner)).by_position
    own = said if isinstance(said, bool) else all(map(said, model.peft_config.values()))
    return of_peft or own


def method_asked(tuner: type) -> Method[PeftConfig, Adapter]:
    """Return the method that a tuner asks; of PEFT's own tuners, one with all defaults."""
    return tuner.method if issubclass(tuner, AskingTuner) else DEFAULTS
