"""Reasons why an adapter cannot be merged or exported as LoRA; no model is loaded for them."""

from typing import Any

from peft import AdaLoraModel, PeftConfig, PeftType

from petl.core.registry import method_of
from petl.core.spec.method import Method


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
