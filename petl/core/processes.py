"""What the processes of a group do together; alone, a process is a group of one."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, distributed

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


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    distributed.all_gather_object(values, value)
    return values
