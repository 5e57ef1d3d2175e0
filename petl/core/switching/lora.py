"""PEFT's LoRA: layers that compute in one function, and a thousand adapters on them."""

from typing import Any, cast

from peft import PeftModel
from torch import nn

from petl.core.compat import LoraLayer, LoraModel
from petl.core.layers.adapter_dict import shelve
from petl.core.layers.fused_lora import fuse_layers
from petl.core.serving.mixed_batch import Rows, generates
from petl.core.switching.tuner import (
    SwitchingTuner,
    let_switch,
    outside_shelves,
    shelves_of,
    trains,
)


class SwitchingLora(SwitchingTuner, LoraModel):
    """PEFT's tuner; what adding, switching and deleting do is the same.

    All kinds of LoRA layers have their adapters in module dicts, DoRA's magnitudes included, which
    become shelves. Those of embeddings are bare parameters: there PEFT looks at all adapters.
    """

    def take(self) -> None:
        """Shelve the layers too, and let those that are PEFT's compute in one function."""
        super().take()
        fuse_layers(self.model)
        for module in outside_shelves(self.model):
            if isinstance(module, LoraLayer):
                shelve(module)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT looks for layers among all modules if rows of a batch have adapters of their own."""
        names = kwargs.get("adapter_names")
        if names is None:
            return super()._enable_peft_forward_hooks(*args, **kwargs)
        kwargs["adapter_names"] = Rows(names, generates=generates(kwargs))
        return self.beginning(super()._enable_peft_forward_hooks(*args, **kwargs), ())


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
            let_switch(module)
    return count


def _switch(tuner: nn.Module) -> None:
    """Make a tuner that is PEFT's LoRA one that switches."""
    if type(tuner) is LoraModel:
        tuner.__class__ = SwitchingLora
        switching = cast(SwitchingLora, tuner)
        switching.take()
        placed = [(name, m) for shelf in shelves_of(switching) for name, m in shelf.items()]
        switching.beside = {name for name, module in placed if trains(module)}
        switching.fresh = {name for name, module in placed if module.training != tuner.training}
