"""Collective operations and sharded tensors; with one process they do nothing."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from petl.errors import InputError

T = TypeVar("T")
REPLICA = "_is_replica"  # attribute of the copies that nn.DataParallel makes for a forward pass


def num_processes() -> int:
    """Return the number of processes that train together."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def number() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if num_processes() > 1 else 0


def summed(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if num_processes() > 1:
        distributed.all_reduce(tensor)
    return tensor


def made_by(owner: int, make: Callable[[], T], *, sent: type[Exception] = InputError) -> T:
    """Call `make()` in process `owner` and return its result on all processes.

    Args:
        sent: errors that are raised on all processes; others on the owner alone.
    """
    if num_processes() == 1:
        return make()
    outcome: list[Any] = [None, None]  # value and error
    if number() == owner:
        try:
            outcome[0] = make()
        except sent as error:  # else the other processes would wait for ever
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=owner)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` on the main process and return its result on all processes.

    Raises:
        Exception: what `function` raised, on all processes.
    """
    return function() if accelerator.num_processes == 1 else made_by(0, function, sent=Exception)


def shared_out(makes: Sequence[Callable[[], T]]) -> list[T]:
    """Distribute calls over the processes and return all results, in order, on all processes.

    Raises:
        InputError: the first one that a call raised, on all processes.
    """
    mine: dict[int, Any] = {}
    # round robin
    for index in range(number(), len(makes), num_processes()):
        try:
            mine[index] = makes[index]()
        except InputError as error:
            mine[index] = error
            break
    results = {index: value for part in gathered(mine) for index, value in part.items()}
    for _, value in sorted(results.items()):
        if isinstance(value, InputError):
            raise value
    return [results[index] for index in range(len(makes))]


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in order of rank."""
    if num_processes() == 1:
        return [value]
    # any picklable objects
    values: list[Any] = [None] * num_processes()
    distributed.all_gather_object(values, value)
    return values


def to_full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (DTensor) on every process: all of them must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_shards(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that all processes have as `like` is sharded, without communication.

    A tensor of another shape, such as a count of steps, is returned unchanged.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    # src_data_rank=None: each process takes its shard of its own copy
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class Counts:
    """Sums integers over all processes in main memory, without synchronizing with the device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.is_distributed = accelerator.num_processes > 1
        self.group = None
        if self.is_distributed and dist.get_backend() != "gloo":  # NCCL sums on the device
            self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))  # a member, as all

    def total(self, *counts: int) -> list[int]:
        """Return the sum of each count over all processes."""
        if not self.is_distributed:
            return list(counts)
        summed = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(summed, group=self.group)
        return summed.tolist()


def is_sharded(model: nn.Module) -> bool:
    """Return True if FSDP2 shards the model."""
    return isinstance(model, FSDPModule)
