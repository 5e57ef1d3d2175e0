"""Base models whose weights are quantised by bitsandbytes or torchao."""

from typing import Any

from torch import nn


def quantised_as(model: nn.Module) -> str:
    """How the weights of a model are quantised: "4bit", "8bit", "torchao" or another; "" if not.

    The first three are abilities, see petl/core/abilities.py.
    """
    given: Any = model
    if getattr(given, "is_loaded_in_4bit", False):
        return "4bit"
    if getattr(given, "is_loaded_in_8bit", False):
        return "8bit"
    method = getattr(given, "quantization_method", None)
    return "" if method is None else str(getattr(method, "value", method))
