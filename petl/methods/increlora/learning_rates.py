"""Per-component learning rates: components added during training have their own schedule.

In any optimizer, all rows of a tensor have one learning rate. Here hooks rescale each optimizer
step afterwards, row by row: p = p_old + m (p - p_old), with m the learning rate of the row divided
by the one that was used. That is exact for updates proportional to the learning rate.
"""

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.utils.hooks import RemovableHandle

from petl.core.types import Group, Record
from petl.errors import UnsupportedError
from petl.methods.increlora.adapter import IncreloraAdapter
from petl.system.collectives import to_local, to_shards

logger = logging.getLogger(__name__)

PROPORTIONAL = (SGD, RMSprop)  # optimizers with update = lr * (a term without a step count)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def group_numbers(optimizer: Optimizer) -> dict[Tensor, int]:
    """For each parameter, the index of its group in the optimizer."""
    return {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}


class ComponentLearningRates:
    """Per-component learning rates of some adapters, through hooks on an optimizer.

    A component that joined the reserve (for A and B) or became active (for E) at step t0 > 0 has
    the learning rate `lr0 f(t - t0 - 1, T - t0 - 1)` at step t, counted from 0, where f rises
    linearly over `warmup` steps and falls linearly to 0 at its second argument. Adam's bias
    correction restarts with it. Inactive rows do not change.

    Args:
        optimizer: the optimizer; all its adapter tensors must have gradients in each step.
        adapters: the adapters of all layers.
        step: number of the next optimizer step.
        end: number of the first step after the training.
        warmup: length of the warmup in steps.

    Raises:
        UnsupportedError: the optimizer does not have the adapters' own tensors.
    """

    handles: tuple[RemovableHandle, ...] = ()  # empty in copies of a model, see `__getstate__`

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
        optimizer = unwrapped(optimizer)
        self.initial = [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]
        tensors, owned = self.tensors(), group_numbers(optimizer)
        if any(t not in owned for t in tensors):
            raise UnsupportedError(
                f"per-component learning rates need the adapter's own tensors, which "
                f"{type(optimizer).__name__} does not have (a wrapper may have copied them); set "
                "restart_warmup=false"
            )
        # allocated once; as many bytes as the adapter
        self.before = [torch.empty_like(to_local(t)) for t in tensors]
        self.is_adam = isinstance(optimizer, Adam)
        if not self.is_adam and not isinstance(optimizer, PROPORTIONAL):
            logger.warning(
                "%s: components added during training have their own learning rates, but the rest "
                "of their optimizer state does not restart",
                type(optimizer).__name__,
            )
        self.handles = (
            optimizer.register_step_pre_hook(self.store_tensors),
            optimizer.register_step_post_hook(self.rescale_step),
        )

    def __getstate__(self) -> Record:
        """Copies and pickles of a model are not attached to the optimizer."""
        return {}

    def detach(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self.handles:
            handle.remove()
        self.handles = ()

    def tensors(self) -> list[Tensor]:
        """`lora_A`, `lora_B` and `E` of each adapter, in this order."""
        return [t for a in self.adapters for t in (a.lora_A, a.lora_B, a.E)]

    @torch.no_grad()
    def store_tensors(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Store the tensors before the optimizer step."""
        torch._foreach_copy_(self.before, [to_local(t) for t in self.tensors()])

    @torch.no_grad()
    def rescale_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Rescale the change of each row by the optimizer step."""
        started = torch.cat([a.steps for a in self.adapters], dim=1)
        sizes = [a.steps.shape[1] for a in self.adapters]
        tensors, group_of = self.tensors(), group_numbers(optimizer)
        by_group = {
            group: self.factors(optimizer, group, started).split(sizes, dim=2)
            for group in {group_of[tensor] for tensor in tensors}
        }
        for i, (tensor, old) in enumerate(zip(tensors, self.before, strict=True)):
            is_B, is_E = i % 3 == 1, i % 3 == 2
            move_C, keep_C = by_group[group_of[tensor]][i // 3][:, 1 if is_E else 0]
            shape = (1, -1) if is_B else (-1, 1)  # components are the columns of B
            move, keep = (
                to_local(to_shards(factor_C.view(shape).expand(tensor.shape), tensor)).to(old)
                for factor_C in (move_C, keep_C)
            )
            new = to_local(tensor)
            new.copy_(torch.lerp(old, new, move).addcmul_(old, keep))
        self.step += 1

    def factors(self, optimizer: Optimizer, number: int, started: Tensor) -> Tensor:
        """Factors [2, ...] of the step and of the old row, for rows that `started` [...] then.

        The new row is old + move (new - old) + keep old. The second term corrects decoupled weight
        decay, which depends on the learning rate but not on the step count.

        Args:
            number: index of the optimizer's group.
            started: step at which each row was added: 0 for the first ones, -1 for inactive ones.
        """
        group = optimizer.param_groups[number]
        age = self.step - started  # 1 in the first step of a component
        lr = float(group["lr"])
        fraction = self.curve(age - 1, self.end - started - 1)
        ratio = fraction * (self.initial[number] / lr if lr else 0.0)  # of its lr to the group's
        ratio = torch.where(age > 0, ratio, torch.zeros_like(ratio))
        restart = (
            self.restart_factor(optimizer, group, age) if self.is_adam else torch.ones_like(ratio)
        )
        decay = lr * group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0
        # the step was u - decay * old; it should have been ratio * (restart * u - decay * old)
        keep = ratio * (restart - 1) * decay
        is_initial, is_inactive = started == 0, started < 0
        move = torch.where(is_initial, torch.ones_like(ratio), ratio * restart)
        return torch.stack(
            [move.masked_fill(is_inactive, 0.0), keep.masked_fill(is_initial | is_inactive, 0.0)]
        )

    def curve(self, step: Tensor, end: Tensor) -> Tensor:
        """f(step, end): the learning rate as a fraction of its peak, linear warmup and decay."""
        rise = step / max(1, self.warmup)
        fall = (end - step) / (end - self.warmup).clamp(min=1)
        return torch.where(step < self.warmup, rise, fall).clamp(min=0.0)

    def restart_factor(self, optimizer: Optimizer, group: Group, age: Tensor) -> Tensor:
        """Factor that turns Adam's update into that of an Adam started `age` steps ago.

        Only bias correction depends on the step count: moments of new rows start at zero anyway.
        """
        states = (optimizer.state[t] for t in group["params"] if t in optimizer.state)
        done = next((s["step"] for s in states if "step" in s), self.step + 1)
        done = torch.as_tensor(done, dtype=torch.float32, device=age.device)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        k = age.clamp(min=1).float()
        return (
            bias_correction(beta1, done)
            / bias_correction(beta1, k)
            * (bias_correction(beta2, k) / bias_correction(beta2, done)).sqrt()
        )


def bias_correction(beta: float, steps: Tensor) -> Tensor:
    """`1 - beta^steps`, by expm1 to avoid cancellation."""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)
