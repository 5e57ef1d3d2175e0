"""Base class of tuners, with a forward context.

Also the check of a file's tensors, and a warning for loops that never call the update of a method
that selects something.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from petl.core.compat import BaseTuner, drop_base_weights
from petl.core.layers.class_swap import AdapterDict
from petl.core.layers.context import ForwardContext
from petl.core.layers.layer import Adapter
from petl.errors import UnsupportedError
from petl.system.files.tensor_file import check_finite, check_shapes

logger = logging.getLogger(__name__)
# of `add_weighted_adapter`, for all methods
NOT_COMBINED = (
    "add_weighted_adapter works for PEFT's LoRA only: export each adapter as a LoRA (petl export "
    "--lora), where its method can, and combine those"
)


class ForwardContextTuner(BaseTuner):
    """Tuner with a `ForwardContext` that hooks of the base model update.

    Attributes:
        context: state that the layers share during a forward pass.
        hooks: handles of these hooks; removed if the first adapter is refused, and by unloading.
        is_kept: False if only the model is kept after the first adapter is injected, as PEFT's
            `inject_adapter_in_model` does, and with it `load_adapter` of transformers.
    """

    context: ForwardContext

    def __init__(self, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        # before `super().__init__`, which injects the first adapter
        self.hooks: list[RemovableHandle] = []
        self.is_kept = isinstance(peft_config, dict)  # as PeftModel calls its tuner
        try:
            super().__init__(model, peft_config, *args, **kwargs)
        except Exception:
            self._remove_hooks()  # the model must be unchanged if its adapter is refused
            raise

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        # PEFT calls this hook once per tuner, before the first adapter is injected
        self.context = ForwardContext()
        self.hooks += [
            model.register_forward_pre_hook(self.context.refuse_wrapper),
            model.register_forward_pre_hook(self.context.begin, with_kwargs=True),
            model.register_forward_hook(self.context.end, with_kwargs=True),
        ]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._remove_hooks()
        return model

    def refuse_without_tuner(self, why: str) -> None:
        """Raise UnsupportedError, with the reason `why`, if the tuner is not kept."""
        if not self.is_kept:
            raise UnsupportedError(
                f"an adapter of {type(self).__name__} cannot be injected without a PeftModel: "
                f"{why}; load it with peft.PeftModel.from_pretrained or petl.load, train it with "
                "petl.wrap"
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise UnsupportedError: a sum of adapters is in general none of the same kind."""
        raise UnsupportedError(NOT_COMBINED)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from all layers, those of blocks included."""
        # PEFT skips modules whose path has the tuner's prefix: contents of its layers, but also
        # `BlockAdapters`, a layer of that name
        vars(self)["prefix"] = "\n"  # in no path; shadows the class attribute
        try:
            super().delete_adapter(adapter_name)
        finally:
            del vars(self)["prefix"]

    def _remove_hooks(self) -> None:
        for handle in self.hooks:
            handle.remove()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select the tensors to save; the weights under adapted layers are never among them."""
        tensors = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        drop_base_weights(model, state_dict)
        return tensors


# Loading


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


# A warning for loops without updates

# optimizer steps without an update, by tuner; one that was updated is no longer watched
_WATCHED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
PATIENCE = 2  # steps; the first update may come after the first one


def watch(tuner: nn.Module) -> None:
    """Warn if two optimizer steps change this tuner's parameters before `updated` is called."""
    _WATCHED[tuner] = 0


def updated(tuner: nn.Module) -> None:
    """Stop watching a tuner, whose update was called."""
    _WATCHED.pop(tuner, None)


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for tuner in list(_WATCHED):
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in stepped for p in tuner.parameters() if p.requires_grad):
            continue
        _WATCHED[tuner] += 1
        if _WATCHED[tuner] >= PATIENCE:
            del _WATCHED[tuner]
            if getattr(tuner, "needs_updates", True):
                logger.warning(
                    "%s has taken %d optimizer steps without an update, so it selects nothing: "
                    "call petl.lifecycle(model).after_step(step, optimizer) after each "
                    "optimizer.step(), or pass callbacks=[petl.Callback()] to a Trainer",
                    type(tuner).__name__,
                    PATIENCE,
                )


# PyTorch calls it after each step of any optimizer; it costs nothing while no tuner is watched
register_optimizer_step_post_hook(_count_step)
