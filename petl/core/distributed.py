"""Collectives and sharded tensors; on one process they do nothing."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from petl.errors import InputError

T = TypeVar("T")


def num_processes() -> int:
    """How many processes train together."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def number() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if num_processes() > 1 else 0


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if num_processes() > 1:
        distributed.all_reduce(tensor)
    return tensor


def made_by(owner: int, make: Callable[[], T]) -> T:
    """What `make()` gives in process `owner`, on all; if it is an InputError, all raise it."""
    if num_processes() == 1:
        return make()
    box: list[Any] = [None, None]
    if number() == owner:
        try:
            box[0] = make()
        except InputError as error:
            box[1] = error
    distributed.broadcast_object_list(box, src=owner)
    if box[1] is not None:
        raise box[1]
    return box[0]


def shared_out(makes: Sequence[Callable[[], T]]) -> list[T]:
    """What each of `makes` gives, on all processes: each is called by one of them, in turn.

    If some are an InputError, all processes raise the first.
    """
    mine: dict[int, Any] = {}
    for index in range(number(), len(makes), num_processes()):
        try:
            mine[index] = makes[index]()
        except InputError as error:
            mine[index] = error
            break
    every = {index: value for part in gathered(mine) for index, value in part.items()}
    for _, value in sorted(every.items()):
        if isinstance(value, InputError):
            raise value
    return [every[index] for index in range(len(makes))]


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    distributed.all_gather_object(values, value)
    return values


def to_full(tensor: Tensor) -> Tensor:
    """A tensor that lies in shares, put together on every process: all of them must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, on the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_shards(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes have, in shares as those of `like`; nothing is sent.

    What is not of the same shape, such as a count of steps, stays as it is.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, on all; if it fails there, it fails on all."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            if accelerator.num_processes == 1:
                raise
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    value, error = outcome
    if error is not None:
        raise error
    return value


class Counts:
    """Adds up whole numbers over all processes through main memory: no device is waited for."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.several = accelerator.num_processes > 1
        self.group = None
        if self.several and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")

    def total(self, *counts: int) -> list[int]:
        if not self.several:
            return list(counts)
        summed = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(summed, group=self.group)
        return summed.tolist()
