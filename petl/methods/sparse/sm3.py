"""The SM3 optimizer for sparse adapters; its accumulators also score candidates for growth."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from petl.core.types import Record
from petl.errors import InputError
from petl.methods.sparse.adapter import SparseAdapter
from petl.system.collectives import to_full, to_shards


class SparseSM3(Optimizer):
    """SM3 on the tuned entries of each weight, with one accumulator per row and one per column.

    Anil et al. 2019, "Memory-Efficient Adaptive Optimization", NeurIPS (arXiv:1901.11150), without
    momentum. For entry (i, j) with gradient g: `a = min(row_i, column_j) + g^2`, both accumulators
    become the largest such a, and the entry changes by `-lr g / sqrt(a + eps)`. Weight decay is
    decoupled. Under FSDP2 each process computes the complete update and applies its shard of it.

    Other tensors, such as a head, are trained by AdamW. SM3 would hardly move them at the learning
    rates of a head: it divides by a sum over all steps, of the largest gradient in row or column.

    Args:
        params: tensors or parameter groups, as for any optimizer.
        model: the model with the sparse adapters.
        lr: learning rate; the authors use 4e-4 to 2e-3.
        weight_decay: decay per step is `lr * weight_decay`, towards the base weight.
        eps: added to SM3's second moment, and to the root of AdamW's.
        betas: decay rates of AdamW's moments.

    Raises:
        InputError: there are no sparse adapters in `model`.
    """

    has_whole_state = True  # complete and equal on all processes, also for sharded parameters

    def __init__(
        self,
        params: ParamsT,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "betas": betas}
        super().__init__(params, defaults)
        found = [m for m in model.modules() if isinstance(m, SparseAdapter)]
        if not found:
            raise InputError(
                f"SparseSM3 needs a model with sparse adapters, and {type(model).__name__} has "
                "none; use AdamW instead"
            )
        self.adapters = {adapter.values: adapter for adapter in found}

    def load_state_dict(self, state_dict: Record) -> None:
        """Restore what `state_dict` returned; torch would round the state to a tensor's dtype."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for number, tensor in zip(numbers, tensors, strict=True):
            for name, value in saved.get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[tensor][name] = value.to(tensor.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = to_full(parameter.grad).float()  # complete under FSDP2
                    if parameter in self.adapters:
                        second = self._accumulate(parameter, gradient)
                        update = gradient / (second + group["eps"]).sqrt_()
                    else:
                        update = _adam(self.state[parameter], gradient, group)
                    # decoupled weight decay
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = to_shards(update.to(parameter.dtype), parameter)
                    parameter.add_(update, alpha=-group["lr"])
        return loss

    def accumulators(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Accumulators of the rows [P] and columns [Q] of the weight that `parameter` tunes."""
        state = self.state[parameter]
        if not state:
            P, Q = self.adapters[parameter].stored_shape
            state["row"] = torch.zeros(P, device=parameter.device)  # P + Q numbers instead of P Q
            state["column"] = torch.zeros(Q, device=parameter.device)
        return state["row"], state["column"]

    def _accumulate(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """Second moments of the tuned entries of a weight, in their order."""
        adapter = self.adapters[parameter]
        row, column = self.accumulators(parameter)
        index, Q = adapter.indices.long(), adapter.stored_shape[1]
        i, j = index // Q, index % Q  # row and column of each entry
        second = torch.minimum(row[i], column[j]).addcmul_(gradient, gradient)
        row.scatter_reduce_(0, i, second, "amax")  # row_i = max over the tuned entries of row i
        column.scatter_reduce_(0, j, second, "amax")
        return second


def _adam(state: Record, gradient: Tensor, group: Record) -> Tensor:
    """Update the moments of Adam, and return the step for a learning rate of 1.

    torch's AdamW would keep shards of the moments under FSDP2, beside the whole state of SM3.
    """
    if "exp_avg" not in state:  # also that of a checkpoint from when SM3 trained these tensors
        state.clear()
        state.update(step=0, exp_avg=torch.zeros_like(gradient))
        state["exp_avg_sq"] = torch.zeros_like(gradient)
    state["step"] += 1
    beta_1, beta_2 = group["betas"]
    mean = state["exp_avg"].lerp_(gradient, 1 - beta_1) / (1 - beta_1 ** state["step"])
    square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta_2) / (
        1 - beta_2 ** state["step"]
    )
    return mean.div_(square.sqrt_().add_(group["eps"]))
