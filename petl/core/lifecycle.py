"""Hooks through which a training loop drives methods and extra losses."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.compat import AdaLoraModel
from petl.core.losses import TrainingPart, loss_list
from petl.core.model.heat_map import HEAT_MAPS, HeatMap, draw
from petl.core.model.names import router_names
from petl.core.model.weight_changes import change_map
from petl.core.tuners.asking import AskingTuner
from petl.core.tuners.gradients import watch_gradients
from petl.core.types import Batch, Group
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic


class Lifecycle:
    """Drives the method and the extra losses of a model; calls that they do not need do nothing.

    A loop calls `prepare` before the optimizer exists and `attach_optimizer` once it does, sets
    `aux_weight` before each forward pass if it accumulates gradients, calls `after_step` after each
    optimizer step, before the gradients are cleared, and `plots` at the end.

    Attributes:
        model: the PeftModel.
        tuner: its tuner.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = _peft_model(model)
        self.tuner: Any = self.model.base_model
        self._own = self.tuner if isinstance(self.tuner, AskingTuner) else None
        self.losses = loss_list(self.model)
        own: list[TrainingPart] = [] if self._own is None else [self._own]
        self.parts = [*own, *self.losses]
        self._aux_weight = 1.0
        watch_gradients(self.model)

    @property
    def aux_weight(self) -> float:
        """Weight of the next forward's auxiliary losses in the gradient of the optimizer step.

        1 without accumulation, else 1 / accumulation steps or the micro-batch's fraction of the
        items, so that the weights of a step add up to one.
        """
        return self._aux_weight

    @aux_weight.setter
    def aux_weight(self, weight: float) -> None:
        self._aux_weight = weight
        for part in self.parts:
            part.context.aux_weight = weight

    def expect_micro_batches(self, count: int) -> None:
        """Set the number of forward and backward passes of each coming optimizer step.

        Without it, a method that selects weights by the gradient of a complete step stores it.
        """
        for part in self.parts:
            part.context.micro_batches = count

    def count_items_over(self, processes: int) -> None:
        """Set the number of processes over which the trainer sums its `num_items_in_batch`."""
        for part in self.parts:
            part.context.item_processes = processes

    @property
    def has_aux(self) -> bool:
        """True if the last training forward had an auxiliary loss."""
        return any(part.context.terms for part in self.parts)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Pass training batches to the extra losses, before the optimizer exists.

        Where an adapter trains the routers of a mixture, the model's own loss of their balance is
        asked for, by `output_router_logits` of its config.
        """
        base = self.model.get_base_model()
        if router_names(base):
            from petl.core.experts.balance import router_balance

            self.parts += [part for part in router_balance(base) if part not in self.parts]
        for loss in self.losses:
            loss.prepare(batches)

    def make_optimizer(self, groups: list[Group]) -> Optimizer | None:
        """Return the optimizer that the method requires, over these parameter groups, or None."""
        own = self._own
        return None if own is None else own.method.optimizer(own.context_of_training(groups=groups))

    def attach_optimizer(
        self, optimizer: Optimizer, start_step: int = 0, total_steps: int | None = None
    ) -> None:
        """Let the method hook into the steps of the optimizer, before the first of them.

        Args:
            optimizer: the one that trains the model.
            start_step: optimizer steps already done, in a resumed run.
            total_steps: length of the run.

        Raises:
            InputError: `optimizer` is none, or has another learning rate than the method sets for
                some of its tensors.
        """
        if not isinstance(getattr(optimizer, "param_groups", None), list):  # also of wrappers
            raise InputError(
                f"attach_optimizer needs the optimizer that trains the model, a "
                f"torch.optim.Optimizer, and got {type(optimizer).__name__}"
            )
        self._check_rates(optimizer)
        self._count(start_step)
        if self._own is not None:
            self._own.attach_optimizer(optimizer, start_step, first=1, total_steps=total_steps)

    def learning_rate_of(self, name: str) -> float | None:
        """Return the peak learning rate that the method sets for a parameter; None: that of all.

        Args:
            name: of the parameter, in the PeftModel.
        """
        own = self._own
        if own is None or not own.method.overrides("rate"):
            return None
        return own.method.rate(own.context_of_training(), name)

    def _check_rates(self, optimizer: Optimizer) -> None:
        if self._own is None or not self._own.method.overrides("rate"):
            return
        peaks = {
            id(parameter): group.get("initial_lr", group["lr"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in self.model.named_parameters():
            own, peak = self.learning_rate_of(name), peaks.get(id(parameter))
            if own is not None and peak is not None and float(peak) != own:
                raise InputError(
                    f"the optimizer trains {name} with a learning rate of {float(peak):g}, and "
                    f"its method sets {own:g}: give such parameters a group of their own, by "
                    "petl.lifecycle(model).learning_rate_of(name)"
                )

    def after_step(self, step: int, optimizer: Optimizer | None = None) -> None:
        """Let the method change ranks, masks or schedules after optimizer step `step`, from 1."""
        self._count(step)
        if self._own is not None:
            self._own.update_and_allocate(step, optimizer)
        elif isinstance(self.tuner, AdaLoraModel):
            self.tuner.update_and_allocate(step - 1)  # PEFT's AdaLoRA counts from 0

    def _count(self, step: int) -> None:
        for part in self.parts:
            part.context.step = step

    def aux_loss(self) -> Tensor:
        """Return the auxiliary loss of the last training forward, 0-d and detached; 0 if none."""
        totals = [part.context.total() for part in self.parts if part.context.terms]
        return torch.stack(totals).sum() if totals else torch.zeros(())

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last training forward for the log; synchronizes with the device."""
        metrics = {"aux_loss": float(self.aux_loss())} if self.has_aux else {}
        for part in self.parts:
            metrics |= part.series()
        return metrics

    def figures(self) -> dict[str, float]:
        """Return the method's figures of the trained adapter, such as its share of zeros."""
        own = self._own
        return {} if own is None else own.method.figures(own.context_of_training())

    def report(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return metrics of the extra losses over validation batches.

        Without extra losses the batches are not read.
        """
        metrics: dict[str, float] = {}
        all_batches = list(batches) if self.losses else []  # each loss iterates over them
        for loss in self.losses:
            metrics |= loss.report(all_batches)
        return metrics

    def heat_maps(self) -> list[HeatMap]:
        """Return maps of what the method and the extra losses did; for PEFT's methods too."""
        tuner, own = self.tuner, self._own
        maps = change_map(tuner.model, tuner.active_adapters) if own is None else own.heat_maps()
        return [*maps, *(each for loss in self.losses for each in loss.heat_maps())]

    def plots(self, folder: Path) -> list[Path]:
        """Write `heat_maps` into `folder`, as heat_maps.json and as pictures; return the files."""
        maps = self.heat_maps()
        if not maps:
            return []
        write_atomic(folder / HEAT_MAPS, as_json([asdict(each) for each in maps]))
        pictures = [folder / f"{each.name}.png" for each in maps]
        for each, picture in zip(maps, pictures, strict=True):
            draw(each, picture)
        return [folder / HEAT_MAPS, *pictures]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that exact resumption needs and the adapter file does not have."""
        own = self._own
        return {} if own is None else own.method.state(own.context_of_training())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            InputError: the state is of another method or model.
        """
        if not isinstance(state, Mapping):
            raise InputError(f"a training state is a dict of tensors, not {type(state).__name__}")
        if state and self._own is not None:
            try:
                self._own.method.load_state(self._own.context_of_training(), state)
            except InputError:  # the method's own reason
                raise
            except (
                LookupError,
                TypeError,
                AttributeError,
                ArithmeticError,
                ValueError,
                RuntimeError,
            ) as error:
                raise _foreign(self.tuner, state) from error
        if set(state) - set(self.state_dict()):  # it must read back
            raise _foreign(self.tuner, state)

    @property
    def can_resume(self) -> bool:
        """True if a checkpoint can hold all that the method changes while it trains."""
        if isinstance(self.tuner, AdaLoraModel):
            return False
        own = None if self._own is None else self._own.method
        return own is None or not own.updates or own.overrides("state")

    @contextmanager
    def resumable(self) -> Generator[None]:
        """Make `save_pretrained` write, in the block, an adapter from which training can resume.

        It does so anyway, except for methods whose files are for inference only (packed codes).
        """
        others = {} if self._own is None else self._own.method.resumable
        configs: list[PeftConfig] = [*self.tuner.peft_config.values()] if others else []
        before = [{name: getattr(config, name) for name in others} for config in configs]
        for config in configs:
            vars(config).update(others)
        try:
            yield
        finally:
            for config, values in zip(configs, before, strict=True):
                vars(config).update(values)


def _foreign(tuner: object, state: Mapping[str, object]) -> InputError:
    return InputError(
        f"the training state does not fit {type(tuner).__name__} on this model: it has "
        f"{len(state)} entries, such as {next(iter(state))!r}; load the state that the same method "
        "saved for the same model"
    )


def lifecycle(model: nn.Module) -> Lifecycle:
    """Return the lifecycle of `model`, a PeftModel or a module that contains one, such as DDP.

    Raises:
        InputError: it contains no PeftModel, or several.
    """
    return Lifecycle(model)


def _peft_model(model: nn.Module) -> PeftModel:
    """Return the one PeftModel in a module: itself, or inside of DDP or SentenceTransformer."""
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    if not found:
        raise InputError(f"{type(model).__name__} holds no PeftModel; call petl.wrap first")
    if len(found) > 1:
        raise InputError(f"{type(model).__name__} holds {len(found)} PeftModels; pass one of them")
    return found[0]
