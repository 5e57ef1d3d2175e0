"""Optimizers that leave values alone which no row picked: plain SGD, and Adam for picked values.

A value that no row of a step picked has a gradient of 0. Momentum, Adam's moments and weight decay
would move it all the same.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer
from torch.optim.optimizer import ParamsT

from petl.core.types import Group
from petl.errors import InputError

SGD_LR, ADAM_LR = 0.3, 1e-2


class SparseAdam(Optimizer):
    """Adam that updates moments and tensor only where the gradient is not 0.

    An entry is a vector along the last axis, such as a value of DKVB. As `torch.optim.SparseAdam`,
    but for dense gradients, which are summed over processes, and without a wait for the device.

    Args:
        params: tensors or parameter groups, as for any optimizer.
        lr: learning rate.
        betas: decay rates of both moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = ADAM_LR,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """One update of every entry that has a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: Group) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU, as in torch's Adam
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, mean, square = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
        has_gradient = gradient.ne(0).any(-1, keepdim=True)
        mean.copy_(torch.where(has_gradient, mean.lerp(gradient, 1 - first), mean))
        of_now = square * second + (1 - second) * gradient * gradient
        square.copy_(torch.where(has_gradient, of_now, square))
        root = (square / (1 - second**step)).sqrt() + group["eps"]
        update = group["lr"] / (1 - first**step) * mean / root
        parameter.copy_(torch.where(has_gradient, parameter - update, parameter))


def make_optimizer(name: str, groups: list[Group]) -> Optimizer:
    """Return the optimizer `name` of a config over these groups, without momentum and decay."""
    kept = ("params", "lr", "initial_lr")
    own = [{key: value for key, value in group.items() if key in kept} for group in groups]
    if name == "sgd":
        return SGD(own, lr=SGD_LR, foreach=True)
    return SparseAdam(own, lr=ADAM_LR)


def check_optimizer(optimizer: Any, parameters: Iterable[nn.Parameter], chosen: str) -> None:
    """Raise InputError if an optimizer would move values that no row picked.

    Args:
        optimizer: a torch optimizer, or a wrapper that has one as `optimizer`.
        parameters: those of the adapters.
        chosen: `DkvbConfig.optimizer`.
    """
    while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):  # Accelerate's wrapper is an Optimizer itself
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    own = {id(parameter) for parameter in parameters}
    name = type(optimizer).__name__
    reason = ""
    if not isinstance(optimizer, SGD | Adagrad | SparseAdam):
        reason = "its moments do" if "adam" in name.lower() else "it may"
    for group in optimizer.param_groups:
        if not any(id(parameter) in own for parameter in group["params"]):
            continue
        for option in ("momentum", "weight_decay"):
            if group.get(option):
                reason = reason or f"its {option}={float(group[option]):g} does"
    if reason:
        raise InputError(
            f"{name} cannot train dkvb, whose values must not change unless a row picks them, and "
            f"{reason} change them: use petl.lifecycle(model).make_optimizer(groups), which gives "
            f"the one of optimizer={chosen}, or torch.optim.SGD without momentum and weight_decay"
        )
