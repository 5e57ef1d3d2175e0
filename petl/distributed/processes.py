"""One process or several: how a run starts, and how its processes come to agree."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


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
