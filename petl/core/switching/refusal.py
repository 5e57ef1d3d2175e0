"""Batches whose rows go through different adapters, of methods that cannot have them."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from petl.errors import UnsupportedError


class NoMixedBatches:
    """Stands in for a tuner's hooks of a forward pass, which would let `adapter_names` drop."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @contextmanager
    def __call__(self, *args: Any, **kwargs: Any) -> Generator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(f"adapter_names is not possible: {self.reason}")
        yield


def refuse_mixed_batches(model: PeftModel, reason: str) -> None:
    """Have `model` raise UnsupportedError for `adapter_names` instead of passing over it."""
    tuner: Any = model.base_model
    tuner._enable_peft_forward_hooks = NoMixedBatches(reason)
