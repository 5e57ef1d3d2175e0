"""The moments at which a method acts on training, for any loop to drive."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.tuner import MethodTuner


class Lifecycle:
    """Drives whatever method is in a model; for one that needs nothing, each call does nothing.

    A loop calls `prepare` once before there is an optimizer, sets `aux_weight` before each forward
    pass if it accumulates gradients, and calls `after_step` after each optimizer step, before the
    gradients are cleared.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tuner: Any = _peft_model(model).base_model
        self._update = getattr(type(self.tuner), "update_and_allocate", None)
        own = isinstance(self.tuner, MethodTuner)
        self._own: MethodTuner | None = self.tuner if own else None

    @property
    def aux_weight(self) -> float:
        """Weight of the coming forward's auxiliary losses in the gradient of the optimizer step.

        1 without accumulation, else 1 / accumulation steps or the share of the items, so that the
        terms of all micro-batches add up to one.
        """
        return self._own.context.aux_weight if self._own else 1.0

    @aux_weight.setter
    def aux_weight(self, weight: float) -> None:
        if self._own:
            self._own.context.aux_weight = weight

    def count_items_over(self, processes: int) -> None:
        """Over how many processes the trainer sums the `num_items_in_batch` that it passes on."""
        if self._own:
            self._own.context.item_processes = processes

    @property
    def has_aux(self) -> bool:
        """Whether the last training forward had an auxiliary loss."""
        return self._own is not None and bool(self._own.context.terms)

    def prepare(self, batches: Iterable[Any]) -> None:
        """Let the method look at training batches, before there is an optimizer."""
        if self._own:
            self._own.prepare(batches)

    def after_step(self, step: int, optimizer: Optimizer | None = None) -> None:
        """Let the method change ranks, masks or schedules after optimizer step `step`, from 1."""
        if self._update is None:
            return
        if "optimizer" in inspect.signature(self._update).parameters:
            self._update(self.tuner, step, optimizer=optimizer)
        else:
            self._update(self.tuner, step - 1)  # PEFT's AdaLoRA counts from 0

    def aux_loss(self) -> Tensor:
        """The auxiliary loss of the last training forward, 0-d, on device; 0 if none."""
        return self._own.aux_loss() if self._own else torch.zeros(())

    def metrics(self) -> dict[str, float]:
        """Figures of the last training forward for the log; waits for the device."""
        if self._own is None:
            return {}
        context = self._own.context
        figures = {"aux_loss": float(context.total())} if context.terms else {}
        return figures | self._own.series()

    def state_dict(self) -> dict[str, Tensor]:
        """What training needs to go on exactly and the adapter file lacks."""
        state = getattr(type(self.tuner), "training_state", None)
        return state(self.tuner) if state else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        if state:
            self.tuner.load_training_state(state)


def lifecycle(model: nn.Module) -> Lifecycle:
    """The lifecycle of the method in `model`, a PeftModel or a wrapper of one such as DDP."""
    return Lifecycle(model)


def _peft_model(model: nn.Module) -> PeftModel:
    inner: Any = model
    while not isinstance(inner, PeftModel):
        inner = getattr(inner, "module", getattr(inner, "_orig_mod", None))
        if inner is None:
            raise TypeError(f"{type(model).__name__} holds no PeftModel; use petl.wrap first")
    return inner
