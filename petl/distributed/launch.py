"""How the processes of a run divide its work: `+launch=ddp|fsdp|deepspeed`, through Accelerate.

Without `launch` it is ddp. A launcher (`torchrun`, `accelerate launch`) starts the processes, on
one machine or several; `launch` defines how they divide model, gradients and optimizer state.
"""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    set_seed,
)
from peft import PeftConfig

from petl.config.schema import read_fields
from petl.core.registry import refusal
from petl.errors import InputError, UnsupportedError, choose
from petl.imports.extras import need_extra

# environment variables of `accelerate launch` that choose a kind
REQUESTED = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
# environment variables of `accelerate launch` that set up DeepSpeed, with the values of a run
ZERO_REQUESTED = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "{stage}",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
}


@dataclass(frozen=True)
class Launch:
    """The settings under `launch`, explained in configs/launch; this one is DDP."""

    name: str = "ddp"

    def check(self) -> None:
        """Raise InputError for settings that are not possible here."""

    def make(self, *, cpu: bool, precision: str) -> Accelerator:
        """Make the Accelerator.

        Args:
            cpu: several processes on the CPU.
            precision: "no" or "bf16", for autocast.

        Raises:
            InputError: this kind needs several processes.
        """
        return Accelerator(cpu=cpu, mixed_precision=precision)


@dataclass(frozen=True)
class FSDP(Launch):
    """FSDP2: parameters, gradients and optimizer state are sharded across processes."""

    reshard_after_forward: bool = True

    def make(self, *, cpu: bool, precision: str) -> Accelerator:
        if number_of_processes() < 2:
            raise InputError(
                "launch=fsdp shards the model across processes, and there is "
                f"{number_of_processes()} (WORLD_SIZE): start several "
                "by torchrun --nproc_per_node N train.py ..., or leave +launch out"
            )
        # Accelerate's own default is FSDP1
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=self.reshard_after_forward,
        )
        if not cpu:
            accelerator = Accelerator(mixed_precision=precision, fsdp_plugin=plugin)
            # autocast as everywhere in petl: adapters stay float32 on a bfloat16 base
            plugin.mixed_precision_policy = None
            return accelerator
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        # FSDP2 runs on a CPU, but Accelerate reads the plugin on other devices only
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        return accelerator


@dataclass(frozen=True)
class DeepSpeed(Launch):
    """ZeRO: sharded optimizer state, and at stage 2 gradients; see distributed/deepspeed.py."""

    stage: int = 2

    def check(self) -> None:
        if self.stage == 3:
            raise InputError(
                f"launch.stage={self.stage} is not possible: a base that DeepSpeed has sharded "
                "cannot run before there is an optimizer, as scoring needs; use +launch=fsdp"
            )
        if self.stage not in (1, 2):
            raise InputError(f"launch.stage={self.stage} is not 1 or 2")
        need_extra("deepspeed", "deepspeed", "launch=deepspeed")
        for variable, ours in ZERO_REQUESTED.items():
            requested = os.environ.get(variable, "")
            if requested not in ("", ours.format(stage=self.stage)):
                raise InputError(
                    f"accelerate launch sets {variable}={requested}, but launch.stage={self.stage} "
                    "is the only DeepSpeed setting of a run: start it by torchrun instead"
                )

    def make(self, *, cpu: bool, precision: str) -> Accelerator:
        if number_of_processes() < 2:
            raise InputError(
                "launch=deepspeed shards the optimizer state across processes, and there is "
                f"{number_of_processes()} (WORLD_SIZE): start "
                "several by torchrun --nproc_per_node N train.py ..., or leave +launch out"
            )
        # else DeepSpeed detects an accelerator by itself
        if cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Accelerate would have DeepSpeed cast the adapters to the precision of the run, and ignores
        # the plugin on a CPU: so it starts as for ddp, with autocast as everywhere in petl
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
        zero = {
            "zero_optimization": {"stage": self.stage},
            "train_micro_batch_size_per_gpu": 1,  # required; the loop counts micro-batches itself
            "gradient_accumulation_steps": 1,
        }
        accelerator.state.deepspeed_plugins = DeepSpeedPlugin(hf_ds_config=zero)
        # Accelerate sets this attribute if it is given the plugin; `prepare` reads it
        accelerator.deepspeed_engine_wrapped = None
        return accelerator


KINDS: dict[str, type[Launch]] = {"ddp": Launch, "fsdp": FSDP, "deepspeed": DeepSpeed}


def read_launch(settings: Mapping[str, Any] | None) -> Launch:
    """Return the checked settings under `launch`; DDP for None.

    Raises:
        InputError: an unknown kind or setting, or the launcher is set up for another kind.
    """
    settings = {"name": "ddp"} if settings is None else settings
    name = settings.get("name")
    kind = choose(KINDS, name, "launch")
    for variable, requested in REQUESTED.items():
        if os.environ.get(variable, "false").lower() == "true" and requested != name:
            raise InputError(
                f"accelerate launch is set up for {requested}, and the run for launch={name}: add "
                f"+launch={requested}, or start it with plain data parallelism (torchrun)"
            )
    launch = read_fields(kind, settings, "launch")
    launch.check()
    return launch


def number_of_processes() -> int:
    """Return the number of processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def alone() -> Generator[None]:
    """Inside the block, ignore the other processes that WORLD_SIZE announces."""
    world_size = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if world_size is not None:
            os.environ["WORLD_SIZE"] = world_size


def make_accelerator(launch: Launch, precision: str) -> Accelerator:
    """Make the Accelerator of a job.

    On a machine without accelerator several processes train on the CPU over gloo. This needs
    `cpu=True`: Accelerate would otherwise start without a process group.
    """
    # a process may run many jobs of a sweep: the settings change, the process group stays
    AcceleratorState._reset_state()
    GradientState._reset_state()
    on_cpu = number_of_processes() > 1 and not torch.accelerator.is_available()
    return launch.make(cpu=on_cpu, precision=precision)


def is_zero(accelerator: Accelerator) -> bool:
    """Return True if DeepSpeed trains."""
    return hasattr(accelerator, "deepspeed_engine_wrapped")


def refuse_sharding(config: PeftConfig, quantization: str | None, accelerator: Accelerator) -> None:
    """Raise UnsupportedError if the run would shard a method or a base that cannot be sharded."""
    if is_zero(accelerator) and refusal(config, "deepspeed"):
        raise UnsupportedError(f"launch=deepspeed is not possible: {refusal(config, 'deepspeed')}")
    if accelerator.num_processes > 1 and (quantization or "").startswith("torchao"):
        raise UnsupportedError(
            f"weights in model.quantization={quantization} can neither be broadcast nor sharded; "
            "use bnb_8bit, or one process"
        )
    if not accelerator.is_fsdp2:
        return
    refuse_fsdp(config, quantization)


def refuse_fsdp(config: PeftConfig, quantization: str | None) -> None:
    """Raise UnsupportedError if FSDP2 cannot shard the method or its base."""
    # quantization is named first: it can be changed without changing the method
    reason = refusal(config, "fsdp")
    if quantization is not None:
        reason = f"weights in model.quantization={quantization} cannot be sharded; use launch=ddp"
    if reason:
        raise UnsupportedError(f"launch=fsdp is not possible: {reason}")


def start(seed: int, precision: str, launch: Launch | None = None) -> Accelerator:
    """Seed all random number generators and make the Accelerator of a run.

    Args:
        precision: "no" or "bf16", for autocast.
        launch: how processes divide the work; None is DDP, or one process.
    """
    set_seed(seed)
    return make_accelerator(launch or Launch(), precision)
