"""How the processes of a run share its work: `+launch=ddp|fsdp|deepspeed`, through Accelerate.

Without `launch` it is ddp. A launcher (`torchrun`, `accelerate launch`) says how many processes
there are and on which machines; what they hold of the model is said here.
"""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from omegaconf import DictConfig
from peft import PeftConfig

from petl.core.registry import refusal
from petl.errors import InputError, UnknownNameError, UnsupportedError, near
from petl.fields import plain, read_fields

# variables of `accelerate launch` that choose a kind, and the kind
ASKED = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}


@dataclass(frozen=True)
class Launch:
    """Settings of `launch`. What each means stands in configs/launch."""

    name: str = "ddp"

    def check(self) -> None:
        """Raise InputError if it cannot be had at all."""

    def make(self, *, cpu: bool, precision: str) -> Accelerator:
        """The Accelerator for it.

        Raises:
            InputError: it needs several processes.
        """
        return Accelerator(cpu=cpu, mixed_precision=precision)


@dataclass(frozen=True)
class FSDP(Launch):
    """FSDP2: parameters, gradients and optimizer in shares."""

    reshard_after_forward: bool = True

    def make(self, *, cpu: bool, precision: str) -> Accelerator:
        if number_of_processes() < 2:
            raise InputError(
                "launch=fsdp spreads the model over processes, and there is one: start several by "
                "torchrun --nproc_per_node N train.py ..., or leave +launch out"
            )
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=self.reshard_after_forward,
        )
        if not cpu:
            accelerator = Accelerator(mixed_precision=precision, fsdp_plugin=plugin)
            plugin.mixed_precision_policy = None  # autocast, as everywhere in petl: adapters stay
            return accelerator  # float32 on a bfloat16 base
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        # FSDP2 runs on a CPU, but Accelerate looks at the plugin on other devices only
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        return accelerator


@dataclass(frozen=True)
class DeepSpeed(Launch):
    """ZeRO, which the loop cannot drive: its engine keeps gradients and optimizer to itself."""

    def check(self) -> None:
        raise InputError(
            "launch=deepspeed is not possible: DeepSpeed's engine clips, steps and keeps gradients "
            "by itself, where methods that change while they train and exact resume need them; "
            "use +launch=fsdp, which spreads weights, gradients and optimizer as ZeRO-3 does"
        )


KINDS: dict[str, type[Launch]] = {"ddp": Launch, "fsdp": FSDP, "deepspeed": DeepSpeed}


def read_launch(cfg: DictConfig | Mapping[str, Any]) -> Launch:
    """The checked settings of `launch` in a run's configuration; ddp if it has none.

    Raises:
        InputError: an unknown kind or setting, or the launcher asks for another kind.
    """
    settings = plain(cfg["launch"]) if cfg.get("launch") is not None else {"name": "ddp"}
    name = str(settings.get("name"))
    if name not in KINDS:
        raise UnknownNameError(f"no launch {name!r}{near(name, KINDS)}")
    for variable, asked in ASKED.items():
        if os.environ.get(variable, "false").lower() == "true" and asked != name:
            raise InputError(
                f"accelerate launch asks for {asked}, and the run for launch={name}: say "
                f"+launch={asked}, or launch it with plain data parallelism (torchrun)"
            )
    launch = read_fields(KINDS[name], settings, "launch")
    launch.check()
    return launch


def number_of_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def alone() -> Generator[None]:
    """Within it there is one process, whatever WORLD_SIZE says."""
    said = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if said is not None:
            os.environ["WORLD_SIZE"] = said


def make_accelerator(launch: Launch, precision: str) -> Accelerator:
    """The Accelerator of a job.

    On a machine without accelerator several processes train on the CPU over gloo; Accelerate has
    to be told, or each believes that it is alone.
    """
    # a sweep runs many jobs in a process: the settings change, the process group stays
    AcceleratorState._reset_state()
    GradientState._reset_state()
    on_cpu = number_of_processes() > 1 and not torch.accelerator.is_available()
    return launch.make(cpu=on_cpu, precision=precision)


def refuse_sharding(config: PeftConfig, quantization: str | None, accelerator: Accelerator) -> None:
    """Raise UnsupportedError if the run shards what cannot be."""
    if not accelerator.is_fsdp2:
        return
    refuse_fsdp(config, quantization)


def refuse_fsdp(config: PeftConfig, quantization: str | None) -> None:
    """Raise UnsupportedError if FSDP2 cannot cut up the method or its base."""
    reason = refusal(config, "fsdp")
    if quantization is not None:
        reason = f"weights in model.quantization={quantization} are not cut up; use launch=ddp"
    if reason:
        raise UnsupportedError(f"launch=fsdp is not possible: {reason}")
