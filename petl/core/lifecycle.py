"""The moments at which methods and extra losses act on training, for any loop to drive."""

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.layers.context import ForwardContext
from petl.core.spec.losses import LossConfig
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError


class Part(Protocol):
    """What the lifecycle drives: a tuner of ours, or an extra loss on the model."""

    context: ForwardContext

    def prepare(self, batches: Iterable[Any]) -> None:
        """Look at training batches once, before there is an optimizer."""

    def series(self) -> dict[str, float]:
        """Figures of the last training forward for the log."""


class ExtraLoss(Part, Protocol):
    """A term of the loss that is on a model beside its method.

    Attributes:
        allows_reentrant: whether it has a gradient under reentrant gradient checkpointing.
    """

    allows_reentrant: bool

    @property
    def config(self) -> LossConfig:
        """Its name and fields."""

    def report(self, batches: Iterable[Any]) -> dict[str, float]:
        """Figures over held-out batches, to compare before and after training."""


class Lifecycle:
    """Drives whatever is in a model; for what needs nothing, each call does nothing.

    A loop calls `prepare` before there is an optimizer and `attach_optimizer` once there is, sets
    `aux_weight` before each forward pass if it accumulates gradients, calls `after_step` after each
    optimizer step, before the gradients are cleared, and `pictures` at the end.
    """

    def __init__(self, model: nn.Module) -> None:
        peft_model = _peft_model(model)
        self.tuner: Any = peft_model.base_model
        self._update = getattr(type(self.tuner), "update_and_allocate", None)
        own: list[Part] = [self.tuner] if isinstance(self.tuner, MethodTuner) else []
        self.losses = extra_losses(peft_model)
        self.parts = [*own, *self.losses]
        self._aux_weight = 1.0

    @property
    def aux_weight(self) -> float:
        """Weight of the coming forward's auxiliary losses in the gradient of the optimizer step.

        1 without accumulation, else 1 / accumulation steps or the share of the items, so that the
        terms of all micro-batches add up to one.
        """
        return self._aux_weight

    @aux_weight.setter
    def aux_weight(self, weight: float) -> None:
        self._aux_weight = weight
        for part in self.parts:
            part.context.aux_weight = weight

    def count_items_over(self, processes: int) -> None:
        """Over how many processes the trainer sums the `num_items_in_batch` that it passes on."""
        for part in self.parts:
            part.context.item_processes = processes

    @property
    def has_aux(self) -> bool:
        """Whether the last training forward had an auxiliary loss."""
        return any(part.context.terms for part in self.parts)

    def prepare(self, batches: Iterable[Any]) -> None:
        """Let methods look at training batches, before there is an optimizer."""
        for part in self.parts:
            part.prepare(batches)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """The optimizer that the method insists on, over these groups; None: any will do."""
        return self.tuner.make_optimizer(groups) if isinstance(self.tuner, MethodTuner) else None

    def attach_optimizer(
        self, optimizer: Optimizer, start_step: int = 0, total_steps: int | None = None
    ) -> None:
        """Let the method act on each step of the optimizer, before the first of them.

        Args:
            optimizer: what trains the model.
            start_step: optimizer steps done before, in a run that is resumed.
            total_steps: length of the run.
        """
        if isinstance(self.tuner, MethodTuner):
            self.tuner.attach_optimizer(optimizer, start_step, first=1, total_steps=total_steps)

    def after_step(self, step: int, optimizer: Optimizer | None = None) -> None:
        """Let the method change ranks, masks or schedules after optimizer step `step`, from 1."""
        if self._update is None:
            return
        if "optimizer" in inspect.signature(self._update).parameters:
            self._update(self.tuner, step, optimizer=optimizer)
        else:
            self._update(self.tuner, step - 1)  # PEFT's AdaLoRA counts from 0

    def aux_loss(self) -> Tensor:
        """The auxiliary loss of the last training forward, 0-d, detached, on device; 0 if none."""
        totals = [part.context.total() for part in self.parts if part.context.terms]
        return torch.stack(totals).sum() if totals else torch.zeros(())

    def metrics(self) -> dict[str, float]:
        """Figures of the last training forward for the log; waits for the device."""
        figures = {"aux_loss": float(self.aux_loss())} if self.has_aux else {}
        for part in self.parts:
            figures |= part.series()
        return figures

    def report(self, batches: Iterable[Any]) -> dict[str, float]:
        """Figures of the extra losses over held-out batches; nothing, unread, if there are none."""
        figures: dict[str, float] = {}
        kept = list(batches) if self.losses else []
        for loss in self.losses:
            figures |= loss.report(kept)
        return figures

    def pictures(self, folder: Path) -> list[Path]:
        """Draw what the method found out while training; the files written into `folder`."""
        return self.tuner.pictures(folder) if isinstance(self.tuner, MethodTuner) else []

    def state_dict(self) -> dict[str, Tensor]:
        """What training needs to go on exactly and the adapter file lacks."""
        state = getattr(type(self.tuner), "training_state", None)
        return state(self.tuner) if state else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        if state:
            self.tuner.load_training_state(state)

    def resumable(self) -> AbstractContextManager[None]:
        """Within it, `save_pretrained` writes what training can go on from.

        That is what it writes anyway, but for a method whose file is for use only.
        """
        within = getattr(type(self.tuner), "resumable", None)
        return within(self.tuner) if within else nullcontext()


def lifecycle(model: nn.Module) -> Lifecycle:
    """The lifecycle of what is in `model`, a PeftModel or a wrapper of one such as DDP.

    Raises:
        InputError: there is no PeftModel in it.
    """
    return Lifecycle(model)


def extra_losses(model: PeftModel) -> list[ExtraLoss]:
    """The extra losses on a PeftModel, a list to add to or take from."""
    return model.__dict__.setdefault("petl_extra_losses", [])


def _peft_model(model: nn.Module) -> PeftModel:
    inner: Any = model
    while not isinstance(inner, PeftModel):
        inner = getattr(inner, "module", getattr(inner, "_orig_mod", None))
        if inner is None:
            raise InputError(f"{type(model).__name__} holds no PeftModel; call petl.wrap first")
    return inner
