"""Fixes for PEFT on a model that it has wrapped or loaded."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from petl.core.compat import freeze_ranks
from petl.errors import UnsupportedError


class NotCombined:
    """Replacement of `add_weighted_adapter` of a tuner whose result would be another update."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(f"add_weighted_adapter is not possible: {self.reason}")


class NoMixedBatches:
    """Replacement of a tuner's forward hooks that raises on `adapter_names`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @contextmanager
    def __call__(self, *args: Any, **kwargs: Any) -> Generator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(f"adapter_names is not possible: {self.reason}")
        yield


def refuse_mixed_batches(model: PeftModel, reason: str) -> None:
    """Make `model` raise UnsupportedError for `adapter_names`, which its tuner would ignore."""
    tuner: Any = model.base_model
    # an instance attribute, which shadows the tuner's method
    tuner._enable_peft_forward_hooks = NoMixedBatches(reason)


def apply_peft_fixes(model: PeftModel, adapter_name: str, not_mixed: str) -> None:
    """Apply three fixes for PEFT to a model that it has wrapped or loaded.

    Freeze AdaLoRA's rank counters, raise on `adapter_names` where the tuner ignores it, and on
    `add_weighted_adapter` where it computes another sum.

    Args:
        not_mixed: why the method of the adapter lacks the capability "mixed"; "": it has it.
    """
    freeze_ranks(model.base_model)
    if not_mixed:
        refuse_mixed_batches(model, not_mixed)
    reason = _not_combined(model.peft_config[adapter_name])
    if reason:
        tuner: Any = model.base_model
        # an instance attribute, as that of `refuse_mixed_batches`
        tuner.add_weighted_adapter = NotCombined(reason)


def _not_combined(config: Any) -> str:
    """Return why PEFT's LoRA cannot add adapters of this config; "": it can."""
    if getattr(config, "use_rslora", False):
        return "PEFT scales the sum of rsLoRA adapters by the root of its rank once more"
    if getattr(config, "use_dora", False):
        return "PEFT ignores the magnitudes of DoRA, and a sum of DoRA's updates is no DoRA"
    return ""
