"""Refusals of PEFT's `convert_to_lora` and `save_as_lora` by PEFT's own layers, with the reason."""

from collections.abc import Iterable
from typing import Any

from petl.core.layers.layer import refuse_conversion


class NoConversion:
    """Replacement of a layer's `supports_lora_conversion` that raises for some adapters.

    Attributes:
        reasons: by adapter name.
        otherwise: the answer for other adapters.
    """

    def __init__(self, *, otherwise: bool) -> None:
        self.reasons: dict[str, str] = {}
        self.otherwise = otherwise

    def __call__(self, adapter_name: str | None = None) -> bool:
        names = self.reasons if adapter_name is None else {adapter_name} & self.reasons.keys()
        if names:
            return refuse_conversion(self.reasons[next(iter(names))], adapter_name)
        return self.otherwise


def set_refusal(layers: Iterable[Any], adapter_name: str, reason: str) -> None:
    """Make PEFT layers refuse to convert an adapter; "" allows it again."""
    for layer in layers:
        answer = vars(layer).get("supports_lora_conversion")
        if answer is None and reason:
            # an instance attribute, which shadows the method
            answer = NoConversion(otherwise=layer.supports_lora_conversion())
            layer.supports_lora_conversion = answer
        if answer is not None:
            answer.reasons.pop(adapter_name, None)
        if reason:
            answer.reasons[adapter_name] = reason
