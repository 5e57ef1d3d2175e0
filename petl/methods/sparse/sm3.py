"""The SM3 optimizer for sparse adapters; its accumulators also score candidates for growth."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.distributed import to_full, to_shards
from petl.errors import InputError
from petl.methods.sparse.adapter import SparseAdapter


class SparseSM3(Optimizer):
    """SM3 on the tuned entries of each weight, with one accumulator per row and one per column.

    Anil et al. 2019, "Memory-Efficient Adaptive Optimization", NeurIPS (arXiv:1901.11150), without
    momentum. For entry (i, j) with gradient g: `a = min(row_i, column_j) + g^2`, both accumulators
    become the largest such a, and the entry changes by `-lr g / sqrt(a + eps)`. Other tensors, such
    as a head, have one accumulator per index of each axis. Weight decay is decoupled. Under FSDP2
    each process computes the complete update and applies its shard of it.

    Args:
        params: tensors or parameter groups, as for any optimizer.
        model: the model with the sparse adapters.
        lr: learning rate; the authors use 4e-4 to 2e-3.
        weight_decay: decay per step is `lr * weight_decay`, towards the base weight.
        eps: added to the second moment, for numerical stability.

    Raises:
        InputError: there are no sparse adapters in `model`.
    """

    has_whole_state = True  # complete and equal on all processes, also for sharded parameters

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eps": eps})
        found = [m for m in model.modules() if isinstance(m, SparseAdapter)]
        if not found:
            raise InputError(
                f"SparseSM3 needs a model with sparse adapters, and {type(model).__name__} has "
                "none; use AdamW instead"
            )
        self.adapters = {adapter.values: adapter for adapter in found}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = to_full(parameter.grad).float()  # complete under FSDP2
                    second = self._accumulate(parameter, gradient)
                    # decoupled weight decay
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = gradient / (second + group["eps"]).sqrt_()
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
        """Second moments of the entries, in the shape of `parameter`."""
        if parameter not in self.adapters:
            return _accumulate_dense(self.state[parameter], gradient)
        adapter = self.adapters[parameter]
        row, column = self.accumulators(parameter)
        index, Q = adapter.indices.long(), adapter.stored_shape[1]
        i, j = index // Q, index % Q  # row and column of each entry
        second = torch.minimum(row[i], column[j]).addcmul_(gradient, gradient)
        row.scatter_reduce_(0, i, second, "amax")  # row_i = max over the tuned entries of row i
        column.scatter_reduce_(0, j, second, "amax")
        return second


def _accumulate_dense(state: dict[str, Any], gradient: Tensor) -> Tensor:
    """Second moments of a dense tensor, with one accumulator per index of each axis."""
    second = gradient.square()
    axes = range(second.dim())
    if state:
        old = [state[f"axis_{axis}"] for axis in axes]
        second += torch.stack(torch.broadcast_tensors(*old)).amin(0) if axes else state["scalar"]
    for axis in axes:
        others = [other for other in axes if other != axis]
        state[f"axis_{axis}"] = second.amax(others, keepdim=True) if others else second
    if not axes:
        state["scalar"] = second
    return second
