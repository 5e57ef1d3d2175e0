"""A pass over calibration data: a model runs over batches while hooks read what it computes."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.hooks import RemovableHandle

from petl.core.model.modes import evaluation_mode
from petl.core.types import Calibration


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a model on a batch, on the model's device, and return its output."""
    return model(**send_to_device(dict(batch), next(model.parameters()).device))


@contextmanager
def calibration_pass(model: nn.Module, hooks: Iterable[RemovableHandle] = ()) -> Generator[None]:
    """Inside the block a model runs in evaluation mode, without gradients and key-value cache.

    Modes and the cache setting are restored afterwards.

    Args:
        hooks: are removed at the end of the block.
    """
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    if cache is not None:
        config.use_cache = False
    try:
        with evaluation_mode(model), torch.no_grad():
            yield
    finally:
        if cache is not None:
            config.use_cache = cache
        for handle in hooks:
            handle.remove()


def run_over(model: nn.Module, data: Calibration, hooks: Iterable[RemovableHandle] = ()) -> None:
    """Run a model once over calibration data; arguments as of `calibration_pass`."""
    with calibration_pass(model, hooks):
        if callable(data):
            data()
        else:
            for batch in data:
                forward(model, batch)
