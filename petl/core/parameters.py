"""The trainable parameters of a model, and those of its adapter."""

from collections.abc import Iterator

from peft import PeftModel
from torch import nn

from petl.core.tuners.tuner import MethodTuner

Named = tuple[str, nn.Parameter]


def trainable(model: nn.Module) -> Iterator[Named]:
    """Yield name and tensor of every trainable parameter of the model."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def adapter_parameters(model: PeftModel) -> int:
    """Parameters of the adapter as it is, or will be, saved; a head that trains is left out."""
    if isinstance(model.base_model, MethodTuner):
        planned = model.base_model.planned_parameters()
        if planned is not None:
            return planned
    own = (p for name, p in trainable(model) if "modules_to_save" not in name.split("."))
    return sum(parameter.numel() for parameter in own)
