"""Starts that reach beyond the adapter."""

from typing import Any

REWRITES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # values of init_lora_weights


def rewrites_base(config: Any) -> bool:
    """Whether an adapter of this config changes the base weights when it begins.

    It is right on the original base only if it is saved relative to its start:
    `save_pretrained(..., path_initial_model_for_weight_conversion=START)`.
    """
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start.startswith(REWRITES_BASE)
