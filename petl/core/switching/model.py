"""PeftModels whose operations on one adapter do not visit the others."""

from collections.abc import Collection, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

from peft import PeftModel
from torch import nn

from petl.core.layers.class_swap import AdapterDict, SwappedClass, swap_class
from petl.core.layers.task_rows import ARGUMENT, PASSED, pass_task_ids
from petl.core.switching.tuner import SwitchingTuner, outside_adapter_dicts

# a model, and those adapters that its `peft_config` lists while this thread saves one of them
_LISTED: ContextVar[tuple[nn.Module | None, Collection[str]]] = ContextVar(
    "_LISTED", default=(None, ())
)


class SwitchingModel(SwappedClass, PeftModel):
    """Mixin for the class of a PeftModel that has a `SwitchingTuner`.

    PEFT's `disable_adapter` checks the status of all adapters first, its `load_adapter` lists the
    tensors of all of them several times, and its `save_pretrained` also compares the name of each
    tensor with that of each adapter.
    """

    @property
    def _tuner(self) -> SwitchingTuner:
        return cast(SwitchingTuner, self.base_model)

    # with PEFT's setter
    @PeftModel.peft_config.getter
    def peft_config(self) -> dict[str, Any]:
        """The config of each adapter, by name."""
        configs = self._tuner.peft_config
        model, names = _LISTED.get()
        return {name: configs[name] for name in names} if model is self else configs

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Disable all adapters in the block; the model computes as its base model."""
        with self._tuner.entering(super().disable_adapter(), self._tuner.in_use()):
            yield

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
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
        **kwargs: Any,
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
            with self._tuner.only_visible({name}), self._listing(name):
                super().save_pretrained(
                    save_directory,
                    safe_serialization,
                    [name],
                    save_embedding_layers,
                    is_main_process,
                    **kwargs,
                )

    @contextmanager
    def _listing(self, adapter_name: str) -> Generator[None]:
        """List, in the block, this adapter, the active ones, and those that cannot be hidden.

        Only for this thread: others may compute with any adapter meanwhile.
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
        names = [name for name in self.peft_config if name in visible]
        token = _LISTED.set((self, names))
        try:
            yield
        finally:
            _LISTED.reset(token)


def only_visible(model: PeftModel, names: Collection[str]) -> AbstractContextManager[None]:
    """Return a context in which a `SwitchingTuner` hides all other adapters; other tuners: none."""
    tuner = model.base_model
    return tuner.only_visible(names) if isinstance(tuner, SwitchingTuner) else nullcontext()


def enable_switching(model: PeftModel) -> None:
    """Swap the class of a model with a `SwitchingTuner` for one with `SwitchingModel`.

    A model of a `TaskTuner` also takes `task_ids`, whatever its class in PEFT.
    """
    if isinstance(model.base_model, SwitchingTuner):
        swap_class(model, SwitchingModel)
    # on the class: PEFT tuners pass unknown attributes to the base model
    if getattr(type(model.base_model), "takes_task_ids", False):
        model.register_forward_pre_hook(pass_task_ids, with_kwargs=True)
        # not for the base model: the tuner reads them in `_enable_peft_forward_hooks`
        model.special_peft_forward_args |= {ARGUMENT, PASSED}
