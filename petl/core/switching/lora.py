"""PEFT's LoRA: layers that compute in one function, and a thousand adapters on them."""

from typing import Any, cast

from peft import PeftModel
from torch import nn

from petl.core.compat import LoraLayer, LoraModel
from petl.core.layers.adapter_dict import convert_module_dicts
from petl.core.layers.fused_lora import fuse_layers
from petl.core.serving.mixed_batch import AdapterRows, is_generation_call
from petl.core.switching.tuner import (
    SwitchingTuner,
    adapter_dicts_of,
    enable_switching,
    is_trainable,
    outside_adapter_dicts,
)


class SwitchingLora(SwitchingTuner, LoraModel):
    """PEFT's tuner; what adding, switching and deleting do is the same.

    All kinds of LoRA layers have their adapters in module dicts, DoRA's magnitudes included, which
    become shelves. Those of embeddings are bare parameters: there PEFT looks at all adapters.
    """

    def convert_layers(self) -> None:
        """Shelve the layers too, and let those that are PEFT's compute in one function."""
        super().convert_layers()
        fuse_layers(self.model)
        for module in outside_adapter_dicts(self.model):
            if isinstance(module, LoraLayer):
                convert_module_dicts(module)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT looks for layers among all modules if rows of a batch have adapters of their own."""
        names = kwargs.get("adapter_names")
        if names is None:
            return super()._enable_peft_forward_hooks(*args, **kwargs)
        kwargs["adapter_names"] = AdapterRows(names, is_generation_call=is_generation_call(kwargs))
        return self.entering(super()._enable_peft_forward_hooks(*args, **kwargs), ())


def fuse_lora(model: nn.Module) -> int:
    """Let PEFT's LoRA layers in `model` compute in one function where they can.

    In a PeftModel of PEFT's LoRA it also lets adapters be added, switched, disabled, deleted and
    loaded as fast among a thousand as alone.

    train.py does so (`train.fuse_lora`), and so do methods of petl's own that train LoRA layers;
    `petl.wrap(model, "lora")` gives PEFT's layers as they are. Parameters, files and what switching
    does stay the same. Outputs differ by rounding: on a base in half precision the update is
    computed in that, not in float32. On a CPU, dropout is drawn otherwise than PEFT's and rounded
    to a multiple of 1/256.

    Returns:
        How many layers that are.
    """
    count = fuse_layers(model)
    for module in list(model.modules()):
        if isinstance(module, PeftModel):
            _switch(module.base_model)
            enable_switching(module)
    return count


def _switch(tuner: nn.Module) -> None:
    """Make a tuner that is PEFT's LoRA one that switches."""
    if type(tuner) is LoraModel:
        tuner.__class__ = SwitchingLora
        switching = cast(SwitchingLora, tuner)
        switching.convert_layers()
        placed = [
            (name, m)
            for adapter_dict in adapter_dicts_of(switching)
            for name, m in adapter_dict.items()
        ]
        switching.extra_trainable = {name for name, module in placed if is_trainable(module)}
        switching.newly_added = {
            name for name, module in placed if module.training != tuner.training
        }
