"""Temporary states of a model: evaluation mode, without its adapters, checkpointing."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Inside the block all modules are in evaluation mode; afterwards each is as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training  # not `train`, which changes its children as well


@contextmanager
def without_adapters(model: nn.Module) -> Generator[None]:
    """Inside the block the model computes as its base model.

    Unlike PEFT's `disable_adapter`, it leaves `requires_grad` of all parameters alone, so that it
    may be used within a training forward. Prompt-learning methods are not covered.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    states = [(m, m._disable_adapters) for m in model.modules() if isinstance(m, kinds)]
    for module, _ in states:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, is_disabled in states:
            module._disable_adapters = is_disabled


def has_enabled_adapter(model: nn.Module) -> bool:
    """Return True if a layer of the model has adapters that are not disabled."""
    first = next((m for m in model.modules() if isinstance(m, BaseTunerLayer)), None)
    return first is not None and not first.disable_adapters


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Return True if a module of transformers runs under reentrant checkpointing in training."""
    running = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in running]
    # a partial of torch's `checkpoint`
    return any(getattr(f, "keywords", {}).get("use_reentrant", False) for f in functions)
