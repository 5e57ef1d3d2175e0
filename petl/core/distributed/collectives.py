"""What the processes of a group do together; alone, a process is a group of one."""

from collections.abc import Callable, Sequence
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
