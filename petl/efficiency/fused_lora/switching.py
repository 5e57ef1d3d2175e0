"""PEFT's LoRA with fused layers, and with switching that does not slow down with many adapters."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel
from torch import nn

from petl.core.compat import LoraLayer, LoraLinear, LoraModel
from petl.core.layers.class_swap import (
    adapter_dicts_of,
    convert_module_dicts,
    outside_adapter_dicts,
)
from petl.core.layers.mixed_batch import is_generation_call
from petl.core.parameters import check_module
from petl.core.support import Capability
from petl.core.tuners.switching import (
    SwitchingModel,
    SwitchingTuner,
    enable_switching,
    is_trainable,
)
from petl.efficiency.fused_lora.layer import FusedLoraLinear, fuse_layers
from petl.efficiency.rewrite import Rewrite, Value


class SwitchingLora(SwitchingTuner, LoraModel):
    """PEFT's LoRA tuner, as a `SwitchingTuner`; adding, switching and deleting do the same.

    All classes of LoRA layers have their adapters in ModuleDicts, DoRA's magnitudes included, which
    become AdapterDicts. Those of embeddings are bare parameters, so there PEFT visits all adapters.
    """

    def convert_layers(self) -> None:
        """Convert heads and LoRA layers, and fuse PEFT's LoRA layers."""
        super().convert_layers()
        fuse_layers(self.model)
        for module in outside_adapter_dicts(self.model):
            if isinstance(module, LoraLayer):
                convert_module_dicts(module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: object, **kwargs: Any) -> Generator[None]:
        """Register PEFT's hooks for `adapter_names` while all adapters are hidden.

        PEFT looks for layers among all modules of the model.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        # one object for all layers, which cache in it for the whole call
        kwargs["adapter_names"] = self.rows_of(names, is_generation_call=is_generation_call(kwargs))
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        with self.only_visible(()):
            hooks.__enter__()
        try:
            yield
        finally:  # without the error, after which PEFT would leave its hooks in the model
            hooks.__exit__(None, None, None)


def fuse_lora(model: nn.Module) -> int:
    """Use the fused forward pass in PEFT's LoRA layers of `model`.

    In a PeftModel of PEFT's LoRA, adding, switching, disabling, deleting and loading adapters also
    become as fast with a thousand adapters as with one.

    `petl train` calls this (`train.fuse_lora`), as do methods of petl that train LoRA layers;
    `petl.wrap(model, "lora")` leaves PEFT's layers unchanged. Parameters, files and the results of
    switching stay the same. Outputs differ by rounding: on a base in half precision the update is
    computed in half precision, not in float32. On a CPU, dropout uses other random numbers than
    PEFT's, and its probability is rounded to a multiple of 1/256.

    Returns:
        The number of layers that were fused.
    """
    check_module(model, "petl.fuse_lora")
    return FuseLora().change(model)


class FuseLora(Rewrite):
    """`fuse_lora` as a rewrite; a model without a LoRA of PEFT has nothing to fuse."""

    capability = Capability.FUSE_LORA
    saves = "LoRA layers in one fused kernel"
    tries = True
    mixins = (SwitchingModel,)

    def refusal(self, model: nn.Module, value: Value = True) -> str:
        """Return why there is nothing to fuse: another method trains."""
        # the tuner of PEFT's LoRA, of which DoRA and others are variants
        is_lora = isinstance(getattr(model, "base_model", None), LoraModel)
        return super().refusal(model, value) if is_lora else "the adapters are no LoRA of PEFT"

    def change(self, model: nn.Module, value: Value = True) -> int:
        """Fuse the layers, and let the model switch by itself."""
        count = fuse_layers(model)
        for module in list(model.modules()):
            if isinstance(module, PeftModel):
                _switch(module.base_model)
                enable_switching(module)
        return count

    def undo(self, model: nn.Module) -> None:
        """Give layers and tuner PEFT's classes again."""
        for module in list(model.modules()):
            if type(module) is SwitchingLora:  # not the tuner of a method that is one
                module.restore_layers()
                module.__class__ = LoraModel
            elif type(module) is FusedLoraLinear:
                module.__class__ = LoraLinear
        super().undo(model)


def _switch(tuner: nn.Module) -> None:
    """Turn a tuner into a `SwitchingLora` if it is PEFT's own LoraModel."""
    if type(tuner) is LoraModel:  # not subclasses, such as AdaLoRA
        # it needs no generated class: pickle finds SwitchingLora by name
        tuner.__class__ = SwitchingLora
        switching = cast(SwitchingLora, tuner)
        switching.convert_layers()
        # what `inject_adapter` and `set_requires_grad` would have recorded
        placed = [
            (name, m)
            for adapter_dict in adapter_dicts_of(switching)
            for name, m in adapter_dict.items()
        ]
        switching.extra_trainable = {name for name, module in placed if is_trainable(module)}
        switching.newly_added = {
            name for name, module in placed if module.training != tuner.training
        }
