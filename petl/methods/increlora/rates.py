"""A learning rate for each component: late ones start a curve of their own.

Rows that belong to one tensor have one learning rate in any optimizer. Here each optimizer step is
corrected after it was made: p = p_old + m (p - p_old) row by row, with m the rate that the row
should have over the rate that it had. That is exact for updates proportional to the rate.
"""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.utils.hooks import RemovableHandle

from petl.core.distributed import to_local, to_shards
from petl.errors import UnsupportedError
from petl.methods.increlora.adapter import IncreloraAdapter

logger = logging.getLogger(__name__)

PROPORTIONAL = (SGD, RMSprop)  # their update is the rate times something that knows no step count
Group = dict[str, Any]


def bare(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def group_numbers(optimizer: Optimizer) -> dict[Tensor, int]:
    """For each parameter, which of the optimizer's groups it is in."""
    return {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}


class ComponentRates:
    """Gives the components of some adapters rates of their own, through hooks on an optimizer.

    A component that was born (for A and B) or activated (for E) at step t0 > 0 follows
    `lr0 f(t - t0 - 1, T - t0 - 1)` at step t, counted from 0, where f rises over `warmup` steps and
    falls linearly to 0 at its second argument. Adam's bias correction starts anew with it. Rows not
    born yet stay as they are.

    Args:
        optimizer: the optimizer; all its adapter tensors have gradients in each step.
        adapters: whose components.
        step: how the coming optimizer step is counted.
        end: how the first step after the last one would be counted.
        warmup: in steps.

    Raises:
        UnsupportedError: the optimizer has other tensors than the adapters'.
    """

    handles: tuple[RemovableHandle, ...] = ()  # a copy of the model is attached to no optimizer

    def __init__(
        self,
        optimizer: Optimizer,
        adapters: Iterable[IncreloraAdapter],
        step: int,
        end: int,
        warmup: int,
    ) -> None:
        self.adapters = [a for a in adapters if a.lora_A.requires_grad]
        self.step, self.end, self.warmup = step, end, warmup
        optimizer = bare(optimizer)
        self.initial = [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]
        tensors, owned = self.tensors(), group_numbers(optimizer)
        if any(t not in owned for t in tensors):
            raise UnsupportedError(
                "the learning rates of single components need the adapter's own tensors in the "
                "optimizer, not copies of them; set restart_warmup=false"
            )
        self.before = [torch.empty_like(to_local(t)) for t in tensors]
        self.is_adam = isinstance(optimizer, Adam)
        if not self.is_adam and not isinstance(optimizer, PROPORTIONAL):
            logger.warning(
                "%s: late components get learning rates of their own, but nothing else of their "
                "optimizer state starts anew",
                type(optimizer).__name__,
            )
        self.handles = (
            optimizer.register_step_pre_hook(self.remember),
            optimizer.register_step_post_hook(self.correct),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self.handles:
            handle.remove()
        self.handles = ()

    def tensors(self) -> list[Tensor]:
        return [t for a in self.adapters for t in (a.lora_A, a.lora_B, a.E)]

    @torch.no_grad()
    def remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Keep what the tensors are before the step."""
        torch._foreach_copy_(self.before, [to_local(t) for t in self.tensors()])

    @torch.no_grad()
    def correct(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Scale what the step did to each row."""
        began = torch.cat([a.steps for a in self.adapters], dim=1)
        sizes = [a.steps.shape[1] for a in self.adapters]
        tensors, number = self.tensors(), group_numbers(optimizer)
        by_group = {
            group: self.factors(optimizer, group, began).split(sizes, dim=2)
            for group in {number[tensor] for tensor in tensors}
        }
        for i, (tensor, old) in enumerate(zip(tensors, self.before, strict=True)):
            kind = i % 3
            move_C, keep_C = by_group[number[tensor]][i // 3][:, 1 if kind == 2 else 0]
            shape = (1, -1) if kind == 1 else (-1, 1)
            move, keep = (
                to_local(to_shards(factor_C.view(shape).expand(tensor.shape), tensor)).to(old)
                for factor_C in (move_C, keep_C)
            )
            now = to_local(tensor)
            now.copy_(torch.lerp(old, now, move).addcmul_(old, keep))
        self.step += 1

    def factors(self, optimizer: Optimizer, number: int, began: Tensor) -> Tensor:
        """By what to scale the step of each row, and what share of the old row to add to that.

        The second undoes what the first does wrong to decoupled weight decay, which knows the
        learning rate but no step count. [2, ...] for `began` [...], the steps at which the rows of
        the optimizer's group with this number began.
        """
        group = optimizer.param_groups[number]
        age = self.step - began  # 1 in the first step that a component takes part in
        rate = float(group["lr"])
        share = self.curve(age - 1, self.end - began - 1)
        late = share * (self.initial[number] / rate if rate else 0.0)
        late = torch.where(age > 0, late, torch.zeros_like(late))
        anew = self.fresh(optimizer, group, age) if self.is_adam else torch.ones_like(late)
        decay = rate * group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0
        # what the step did is u - decay * old, and should have been late * (anew * u - decay * old)
        keep = late * (anew - 1) * decay
        first = began == 0
        move = torch.where(first, torch.ones_like(late), late * anew)
        unborn = began < 0
        return torch.stack([move.masked_fill(unborn, 0.0), keep.masked_fill(first | unborn, 0.0)])

    def curve(self, step: Tensor, end: Tensor) -> Tensor:
        """f(step, end): the share of its peak that a rate has."""
        rise = step / max(1, self.warmup)
        fall = (end - step) / (end - self.warmup).clamp(min=1)
        return torch.where(step < self.warmup, rise, fall).clamp(min=0.0)

    def fresh(self, optimizer: Optimizer, group: Group, age: Tensor) -> Tensor:
        """What turns Adam's update into that of an Adam which began `age` steps ago."""
        states = (optimizer.state[t] for t in group["params"] if t in optimizer.state)
        done = next((s["step"] for s in states if "step" in s), self.step + 1)
        done = torch.as_tensor(done, dtype=torch.float32, device=age.device)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        k = age.clamp(min=1).float()
        return (
            corrected(beta1, done)
            / corrected(beta1, k)
            * (corrected(beta2, k) / corrected(beta2, done)).sqrt()
        )


def corrected(beta: float, steps: Tensor) -> Tensor:
    """`1 - beta^steps`, without the cancellation."""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)
