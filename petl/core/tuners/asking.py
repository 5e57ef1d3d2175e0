"""AskingTuner, a mixin for tuners of PEFT that asks a `Method` what happens to its adapters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.layers.layer import Adapter
from petl.core.method import AdapterSet, Method, NewAdapters, Tensors, TrainContext
from petl.core.model.heat_map import HeatMap
from petl.core.model.weight_changes import change_map
from petl.core.support import Capability
from petl.core.switching.tuner import SwitchingTuner, layers_of
from petl.core.tuners.base import ForwardContextTuner, updated, watch
from petl.errors import InputError, UnsupportedError


class AskingTuner(SwitchingTuner, ForwardContextTuner):
    """Mixin that comes before a tuner of PEFT, and asks the `method` of the class.

    Attributes:
        method: what it asks.
        kept: what the method remembers of this model, under keys of its own.
        placed: by adapter name and module path, the adapters in the model's order; without those of
            PEFT's own layers.
    """

    method: ClassVar[Method[Any, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept: dict[Any, Any] = {}
        self.placed: dict[str, dict[str, Adapter]] = {}
        super().__init__(*args, **kwargs)

    def adapter_set(self, adapter_name: str) -> AdapterSet[Any, Any]:
        """Return the adapters called `adapter_name`."""
        placed, config = self.placed.get(adapter_name, {}), self.peft_config[adapter_name]
        return AdapterSet(self.model, adapter_name, config, placed)

    @classmethod
    def _set_in(cls, model: nn.Module, adapter_name: str, config: Any) -> AdapterSet[Any, Any]:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        # beside those of an inner method there may be others
        layers = (layer for layer in layers_of(base) if layer.slot == f"{cls.prefix}adapters")
        picked = (adapter for layer in layers for _, adapter in layer.pick([adapter_name]))
        return AdapterSet(base, adapter_name, config, {a.info.key: a for a in picked})

    # Adapters: add, activate, delete

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject an adapter with PEFT, then let the method complete it."""
        method, config = self.method, self.peft_config[adapter_name]
        if method.needs_tuner:
            self.refuse_without_tuner(method.needs_tuner)
        if method.updates and not config.inference_mode:
            self.refuse_without_tuner("it changes its adapters while they train")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        found = self.adapter_set(adapter_name)
        of_model = {"context": self.context, "hooks": self.hooks, "kept": self.kept}
        try:
            method.added(NewAdapters(**vars(found), **of_model, placed=self.placed))
        except InputError:
            self._take_back(adapter_name, trained)
            raise
        if method.updates:
            watch(self)

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
        merges = Capability.MERGE not in self.method.lacks
        changes = change_map(self.model, self.active_adapters) if merges else []
        return [*self.method.heat_maps(self.context_of_training()), *changes]

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
        tensors = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return cls.method.pack(cls._set_in(model, adapter_name, config), tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Tensors
    ) -> Tensors:
        """Return the tensors of a file under the model's names."""
        found = cls.method.unpack(cls._set_in(model, adapter_name, config), dict(state_dict))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, found)


DEFAULTS: Method[Any, Any] = Method()


def method_asked(tuner: type[Any]) -> Method[Any, Any]:
    """Return the method that a tuner asks; of PEFT's own tuners, one with all defaults."""
    return tuner.method if issubclass(tuner, AskingTuner) else DEFAULTS
