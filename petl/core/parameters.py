"""The parameters of a model: which train, which belong to norms, how they are quantized."""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import nn

from petl.core.compat import AuxiliaryTrainingWrapper
from petl.errors import InputError

Named = tuple[str, nn.Parameter]


def trainable(model: nn.Module) -> Iterator[Named]:
    """Yield name and tensor of every trainable parameter of the model."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def adapter_parameters(model: PeftModel) -> int:
    """Return the number of parameters of the adapter as saved after training, without heads."""
    # of the class: PEFT's tuners pass unknown attributes on to the base model
    planned_parameters = getattr(type(model.base_model), "planned_parameters", None)
    planned = None if planned_parameters is None else planned_parameters(model.base_model)
    if planned is not None:
        return planned
    # PEFT's methods: all that trains but heads
    own = (p for name, p in trainable(model) if "modules_to_save" not in name.split("."))
    return sum(parameter.numel() for parameter in own)


def is_norm(module: nn.Module) -> bool:
    """Return True for a norm with a 1-D weight, or PEFT's trained copy of one."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1


def quantization_of(model: nn.Module) -> str:
    """Return how the weights of a model are quantized: "4bit", "8bit", "torchao", ...; "" if not.

    The first three are names of capabilities, see petl/core/spec/capabilities.py.
    """
    loaded: Any = model
    # set by transformers' bitsandbytes loader
    if getattr(loaded, "is_loaded_in_4bit", False):
        return "4bit"
    if getattr(loaded, "is_loaded_in_8bit", False):
        return "8bit"
    method = getattr(loaded, "quantization_method", None)
    return "" if method is None else str(getattr(method, "value", method))


def check_module(model: object, function: str) -> None:
    """Raise InputError if the model that a public function is called with is no model."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{function} needs a model, a torch.nn.Module, and got {type(model).__name__}: load it "
            "first, such as by AutoModelForCausalLM.from_pretrained(NAME)"
        )
