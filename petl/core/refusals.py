"""Reasons why an adapter cannot be merged or exported as LoRA; no model is loaded for them."""

from typing import Any

from peft import AdaLoraModel, PeftConfig, PeftModel, PeftType
from torch import nn

from petl.core.compat import LoraLayer
from petl.core.registry import method_of
from petl.core.spec.method import Method
from petl.errors import UnsupportedError


def merge_refusal(config: PeftConfig) -> str | None:
    """Return why an adapter of this config cannot be merged into the base; None: it can."""
    entry = method_of(config)
    of_tuner = getattr(entry.tuner, "merge_refusal", None) if entry else None
    if of_tuner is not None:
        return of_tuner
    adapter_cls = _adapter_cls(entry)
    if adapter_cls is not None:
        return adapter_cls.merge_refusal
    return f"PEFT cannot merge {config.peft_type}" if entry and not entry.merges else None


def lora_refusal(config: PeftConfig) -> str | None:
    """Return why an adapter of this config cannot be exported as a LoRA; None: it can."""
    entry = method_of(config)
    if is_lora(config) or (entry and entry.exports_lora):
        return None
    name = entry.name if entry else config.peft_type
    refusal = merge_refusal(config) or getattr(_adapter_cls(entry), "lora_refusal", None)
    if refusal:
        return f"{name} cannot become a LoRA: {refusal}"
    return f"PEFT has no conversion of {name} to LoRA; `petl merge` writes a merged model instead"


def _adapter_cls(entry: Method | None) -> Any:
    """Return the adapter class of a method of petl; None for PEFT's."""
    return getattr(entry.tuner, "adapter_cls", None) if entry else None


def adamr_refusal(tuner: type[Any]) -> str | None:
    """Return why AdamR cannot train the adapters of a tuner; None: it can."""
    # AdaLoRA masks ranks in place, so that its entries keep their reference
    stay = issubclass(tuner, AdaLoraModel) or not getattr(tuner, "moves_entries", True)
    if not hasattr(tuner, "update_and_allocate") or stay:
        return None
    return "it adds or exchanges entries while it trains, and the reference does not move with them"


def is_lora(config: PeftConfig) -> bool:
    """Return True for PEFT's own LoRA.

    AdaLoRA's config is a subclass, but its tensors are different, so the type is compared.
    """
    return config.peft_type == PeftType.LORA


def refuse_more_than_factors(model: PeftModel, adapter_name: str = "default") -> None:
    """Raise UnsupportedError if an adapter is more than the factors A and B of linear layers.

    A DoRA is, for one, or a LoRA with trained biases.
    """
    config: Any = model.peft_config[adapter_name]
    tokens = getattr(config, "trainable_token_indices", None)
    if getattr(config, "bias", "none") != "none" or tokens:
        raise UnsupportedError(
            "the adapter trains biases or tokens besides its updates of weights, which two factors "
            "a layer cannot hold"
        )
    for path, layer in model.named_modules() if is_lora(config) else ():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        A = dict(layer.lora_A.items()).get(adapter_name)
        more = layer.lora_variant.get(adapter_name) or layer.lora_bias.get(adapter_name)
        # stacked experts have one A of all their ranks
        if more or type(A) is not nn.Linear or len(A.weight) != layer.r[adapter_name]:
            raise UnsupportedError(
                f"{path} is no linear layer, or its update is not the product of two factors of "
                f"rank {layer.r[adapter_name]} (DoRA, another variant, a bias, stacked experts)"
            )
