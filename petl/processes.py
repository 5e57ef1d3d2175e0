"""One process or several: how a run starts, and how its processes come to agree."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, broadcast_object_list, set_seed

from petl.errors import InputError
from petl.settings import TrainConfig

T = TypeVar("T")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def start(settings: TrainConfig, dtype: str) -> Accelerator:
    """The Accelerator of a run whose model has this dtype; from here on draws follow the seed.

    On a machine without accelerator several processes train on the CPU over gloo; Accelerate has
    to be told, or each believes that it is alone.

    Raises:
        InputError: a launcher asks for a sharded model, which checkpoints here do not cover.
    """
    # a sweep runs many jobs in a process: the settings change, the process group stays
    AcceleratorState._reset_state()
    GradientState._reset_state()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = several and not torch.accelerator.is_available()
    set_seed(settings.seed)
    precision = settings.computes_in(dtype)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
    if accelerator.distributed_type in SHARDED:
        raise InputError(
            f"{accelerator.distributed_type.value} shards the model, which train.py cannot save; "
            "launch with plain data parallelism (torchrun), or train with Trainer and petl.wrap"
        )
    return accelerator


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
