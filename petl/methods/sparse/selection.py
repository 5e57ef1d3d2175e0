"""Drop-and-grow after an update: accumulated gradients, the exchange, checks of the optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from petl.core.layers.context import num_processes
from petl.core.method import AdapterSet, TrainContext
from petl.errors import InputError, UnsupportedError
from petl.methods.sparse.adapter import SparseAdapter
from petl.methods.sparse.config import SparseConfig
from petl.methods.sparse.sm3 import SparseSM3
from petl.ops.positions import largest_outer
from petl.system.collectives import to_full

AVERAGED = (
    "reselection needs values whose gradients are averaged over processes; let FSDP2 shard them, "
    "train with DDP, or use selection_algorithm='none'"
)
SINGLE = (
    "reselection reads gradients and moves the optimizer's state of single values, which ZeRO "
    "shards; train with DDP, or use selection_algorithm='none'"
)
FLAT = (
    "reselection exchanges values of whole tensors, of which FSDP1 leaves each process flat parts, "
    "unless selection_algorithm='none'"
)


def select(adapter: SparseAdapter, fraction: float, optimizer: Optimizer) -> None:
    """Exchange up to `fraction` of an adapter's entries."""
    count = int(len(adapter.values) * fraction)
    by_sm3 = isinstance(optimizer, SparseSM3)
    if by_sm3:
        row, column = optimizer.accumulators(adapter.values)  # scores are row_i * column_j
        candidates, scores = largest_outer(row, column, adapter.indices, count)
    elif adapter.candidates is not None:
        candidates, scores = adapter.candidates.candidates, adapter.candidates.total
    else:  # no gradient reached this layer
        return
    adapter.exchange(candidates, scores, count, None if by_sm3 else optimizer)


def end_update(adapters: Sequence[SparseAdapter]) -> None:
    """Add this update's gradients at the candidates, averaged and clipped like the optimizer's.

    They are averaged over processes, as by DDP. The clipping factor follows from the gradients of
    the tuned entries, which are known before (`own`) and after clipping (`values.grad`).

    The first update of an accumulation also chooses the candidates.
    """
    for adapter in adapters:
        # one at a time, so that only one complete gradient is reduced
        adapter.choose_candidates()
    active = [(a.candidates, a.values.grad) for a in adapters if a.candidates is not None]
    active = [(found, None if grad is None else to_full(grad)) for found, grad in active]
    # of this process's micro-batches
    sums = [t for found, _ in active for t in (found.update, found.own)]
    processes = num_processes()
    if processes > 1 and sums:
        flat = torch.cat(sums)  # one reduction, whatever the number of layers
        torch.distributed.all_reduce(flat)
        sums = (flat / processes).split([len(t) for t in sums])
    updates, own = sums[::2], sums[1::2]
    pairs = [(raw, grad) for raw, (_, grad) in zip(own, active, strict=True) if grad is not None]
    factor = _ratio(pairs) if pairs else torch.ones(())
    for (found, _), update in zip(active, updates, strict=True):
        found.end_update(update * factor.to(update.device))


def _ratio(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Least-squares factor, 0-d, from the first tensors to the second ones; 1 if they are 0."""
    device = pairs[0][0].device
    # over all layers: clipping scales them by one factor
    before = torch.stack([raw.dot(raw).to(device) for raw, _ in pairs]).sum()
    across = torch.stack([raw.dot(grad.float()).to(device) for raw, grad in pairs]).sum()
    return torch.where(before > 0, across / before, 1.0)


def checked(
    t: TrainContext[SparseConfig, SparseAdapter], adapters: AdapterSet[SparseConfig, SparseAdapter]
) -> Optimizer:
    """The optimizer without its wrappers, after checks.

    Raises:
        InputError: `total_step` is null, or the optimizer is missing, of the wrong class, or does
            not have the values.
        UnsupportedError: gradients are not averaged over the processes, or scaled by fp16.
    """
    config, own = adapters.config, list(adapters.adapters.values())
    config.check_total()
    refuse_sharding(t.model, own)
    if t.optimizer is None:
        raise InputError(
            f"selection_algorithm={config.selection_algorithm!r} moves the optimizer's state with "
            "the weights: pass the optimizer to update_and_allocate(step, optimizer)"
        )
    optimizer: Any = t.optimizer
    # unwrap Accelerate's optimizer, whose scaler is set for fp16
    while True:
        if config.selection_algorithm == "rigl" and getattr(optimizer, "scaler", None) is not None:
            raise UnsupportedError(
                f"selection_algorithm={config.selection_algorithm!r} does not support fp16, which "
                "scales gradients by a factor that changes between updates; use bf16, or "
                "selection_algorithm='sm3'"
            )
        if getattr(optimizer, "optimizer", None) is None:
            break
        optimizer = optimizer.optimizer
    if config.selection_algorithm == "sm3" and not isinstance(optimizer, SparseSM3):
        raise InputError(
            "selection_algorithm='sm3' needs the accumulators of petl.methods.sparse.SparseSM3, "
            f"but the optimizer is {type(optimizer).__name__}; use SparseSM3, or "
            "selection_algorithm='rigl'"
        )
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [adapter.info.key for adapter in own if id(adapter.values) not in ids]
    if missing:
        raise InputError(
            f"sparse: the optimizer does not have the values of {missing[0]}; pass the optimizer "
            "of the trained parameters"
        )
    return optimizer


def refuse_sharding(model: nn.Module, adapters: Sequence[SparseAdapter]) -> None:
    """Raise UnsupportedError if ZeRO-3 shards the values, or FSDP shards the model but not them.

    FSDP does not average gradients of parameters that it ignores, so processes would diverge.
    """
    sharded = any(len(adapter.values) != len(adapter.indices) for adapter in adapters)  # by ZeRO-3
    ignored = any(not isinstance(adapter.values, DTensor) for adapter in adapters)
    if sharded or (ignored and any(isinstance(p, DTensor) for p in model.parameters())):
        raise UnsupportedError(f"sparse: {AVERAGED}")
