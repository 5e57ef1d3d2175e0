"""The revision of the set after an update: what was watched, what is exchanged, by whose state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from petl.core.distributed import to_full
from petl.core.layers.context import num_processes
from petl.errors import InputError, UnsupportedError
from petl.methods.sparse.adapter import SparseAdapter
from petl.methods.sparse.sm3 import SparseSM3
from petl.ops.positions import largest_outer

AVERAGED = (
    "reselection needs values whose gradients the processes average; let FSDP2 cut them up, train "
    "with DDP, or use selection_algorithm='none'"
)
SINGLE = (
    "reselection reads gradients and moves the optimizer's state of single values, which ZeRO has "
    "in shares; train with DDP, or use selection_algorithm='none'"
)


def select(adapter: SparseAdapter, share: float, optimizer: Optimizer) -> None:
    """Exchange up to `share` of an adapter's entries."""
    count = int(len(adapter.values) * share)
    by_sm3 = isinstance(optimizer, SparseSM3)
    if by_sm3:
        row, column = optimizer.accumulators(adapter.values)
        candidates, scores = largest_outer(row, column, adapter.indices, count)
    elif adapter.watch is not None:  # None: no gradient reached this layer
        candidates, scores = adapter.watch.candidates, adapter.watch.total
    else:
        return
    adapter.exchange(candidates, scores, count, None if by_sm3 else optimizer)


def end_update(adapters: Sequence[SparseAdapter]) -> None:
    """Take this update's gradients at the candidates, as the optimizer was given its own.

    That is averaged over the processes, as DDP does, and clipped: by how much shows in the tuned
    entries, whose gradient is known from before and after.
    """
    watched = [(a.watch, a.values.grad) for a in adapters if a.watch is not None]
    watched = [(watch, None if grad is None else to_full(grad)) for watch, grad in watched]
    sums = [t for watch, _ in watched for t in (watch.update, watch.own)]
    processes = num_processes()
    if processes > 1 and sums:
        flat = torch.cat(sums)  # one message, whatever the number of layers
        torch.distributed.all_reduce(flat)
        sums = (flat / processes).split([len(t) for t in sums])
    updates, own = sums[::2], sums[1::2]
    pairs = [(raw, grad) for raw, (_, grad) in zip(own, watched, strict=True) if grad is not None]
    clipped = _ratio(pairs) if pairs else torch.ones(())
    for (watch, _), update in zip(watched, updates, strict=True):
        watch.end_update(update * clipped.to(update.device))


def _ratio(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The factor, 0-d, that best makes the first tensors into the second ones; 1 if they are 0."""
    device = pairs[0][0].device
    before = torch.stack([raw.dot(raw).to(device) for raw, _ in pairs]).sum()
    across = torch.stack([raw.dot(grad.float()).to(device) for raw, grad in pairs]).sum()
    return torch.where(before > 0, across / before, 1.0)


def checked(config: Any, optimizer: Any, adapters: Sequence[SparseAdapter]) -> Optimizer:
    """The optimizer itself, out of its wrappers, after it was found fit."""
    if optimizer is None:
        raise InputError(
            "method 'sparse' moves the optimizer's state with the weights: pass the optimizer to "
            "update_and_allocate(step, optimizer)"
        )
    while True:
        if config.selection_algorithm == "rigl" and getattr(optimizer, "scaler", None) is not None:
            raise UnsupportedError(
                "sparse: fp16 scales the gradients that are watched; use bf16, or "
                "selection_algorithm='sm3'"
            )
        if getattr(optimizer, "optimizer", None) is None:
            break
        optimizer = optimizer.optimizer
    if config.selection_algorithm == "sm3" and not isinstance(optimizer, SparseSM3):
        raise InputError(
            "selection_algorithm='sm3' grows by the accumulators of petl.methods.sparse.SparseSM3, "
            f"and the optimizer is {type(optimizer).__name__}; use that one, or "
            "selection_algorithm='rigl'"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(adapter.values) not in held for adapter in adapters):
        raise InputError("sparse: the optimizer does not hold the values; pass the one that does")
    return optimizer


def refuse_sharding(model: nn.Module, adapters: Sequence[SparseAdapter]) -> None:
    """Raise UnsupportedError if FSDP leaves values alone among what it shards, or ZeRO-3 has them.

    FSDP does not average the gradients of parameters that it ignores, and processes drift apart.
    """
    cut = any(len(adapter.values) != len(adapter.indices) for adapter in adapters)  # by ZeRO-3
    left = any(not isinstance(adapter.values, DTensor) for adapter in adapters)
    if cut or (left and any(isinstance(parameter, DTensor) for parameter in model.parameters())):
        raise UnsupportedError(f"sparse: {AVERAGED}")
