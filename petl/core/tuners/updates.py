"""A warning for training loops that never call the update of a method that selects something."""

import logging
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

logger = logging.getLogger(__name__)
# optimizer steps without an update, by tuner; one that was updated is no longer watched
_WATCHED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
PATIENCE = 2  # steps; the first update may come after the first one


def watch(tuner: nn.Module) -> None:
    """Warn if two optimizer steps change this tuner's parameters before `updated` is called."""
    _WATCHED[tuner] = 0


def updated(tuner: nn.Module) -> None:
    """Stop watching a tuner, whose update was called."""
    _WATCHED.pop(tuner, None)


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for tuner in list(_WATCHED):
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in stepped for p in tuner.parameters() if p.requires_grad):
            continue
        _WATCHED[tuner] += 1
        if _WATCHED[tuner] >= PATIENCE:
            del _WATCHED[tuner]
            if getattr(tuner, "needs_updates", True):
                logger.warning(
                    "%s has taken %d optimizer steps without an update, so it selects nothing: "
                    "call petl.lifecycle(model).after_step(step, optimizer) after each "
                    "optimizer.step(), or pass callbacks=[petl.Callback()] to a Trainer",
                    type(tuner).__name__,
                    PATIENCE,
                )


# PyTorch calls it after each step of any optimizer; it costs nothing while no tuner is watched
register_optimizer_step_post_hook(_count_step)
