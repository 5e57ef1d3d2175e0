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
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    set_seed,
)
from omegaconf import DictConfig
from peft import PeftConfig

from petl.config.schema import plain, read_fields
from petl.core.registry import refusal
from petl.errors import InputError, UnknownNameError, UnsupportedError, did_you_mean
from petl.imports.extras import need_extra

# variables of `accelerate launch` that choose a kind, and the kind
ASKED = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
# and those that set DeepSpeed, with what the run has
ZERO_ASKED = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "{stage}",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
}


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
    """ZeRO: the optimizer, and at stage 2 gradients, in shares; see petl/zero.py."""

    stage: int = 2

    def check(self) -> None:
        if self.stage == 3:
            raise InputError(
                "launch.stage=3 is not possible: a base that DeepSpeed has cut up cannot run "
                "before there is an optimizer, as it has to here; +launch=fsdp cuts it up as well"
            )
        if self.stage not in (1, 2):
            raise InputError(f"launch.stage={self.stage} is not 1 or 2")
        need_extra("deepspeed", "deepspeed", "launch=deepspeed")
        for variable, ours in ZERO_ASKED.items():
            asked = os.environ.get(variable, "")
            if asked not in ("", ours.format(stage=self.stage)):
                raise InputError(
                    f"accelerate launch asks for {variable}={asked}, and the run for launch.stage="
                    f"{self.stage} and nothing else of DeepSpeed's: leave it to the run (torchrun)"
                )

    def make(self, *, cpu: bool, precision: str) -> Accelerator:
        if number_of_processes() < 2:
            raise InputError(
                "launch=deepspeed spreads the optimizer over processes, and there is one: start "
                "several by torchrun --nproc_per_node N train.py ..., or leave +launch out"
            )
        if cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Accelerate would let DeepSpeed cast the adapters to the precision of the run, and on a CPU
        # would not look at the plugin: it starts as for ddp, with autocast as everywhere in petl
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
        zero = {
            "zero_optimization": {"stage": self.stage},
            "train_micro_batch_size_per_gpu": 1,  # wanted, but the loop has its own count
            "gradient_accumulation_steps": 1,
        }
        accelerator.state.deepspeed_plugins = DeepSpeedPlugin(hf_ds_config=zero)
        accelerator.deepspeed_engine_wrapped = None  # as where Accelerate was given the plugin
        return accelerator


KINDS: dict[str, type[Launch]] = {"ddp": Launch, "fsdp": FSDP, "deepspeed": DeepSpeed}


def read_launch(cfg: DictConfig | Mapping[str, Any]) -> Launch:
    """The checked settings of `launch` in a run's configuration; ddp if it has none.

    Raises:
        InputError: an unknown kind or setting, or the launcher asks for another kind.
    """
    settings = plain(cfg["launch"]) if cfg.get("launch") is not None else {"name": "ddp"}
    name = str(settings.get("name"))
    if name not in KINDS:
        raise UnknownNameError(f"no launch {name!r}{did_you_mean(name, KINDS)}")
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


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed is to train."""
    return hasattr(accelerator, "deepspeed_engine_wrapped")


def refuse_sharding(config: PeftConfig, quantization: str | None, accelerator: Accelerator) -> None:
    """Raise UnsupportedError if the run shards what cannot be."""
    if is_zero(accelerator) and refusal(config, "deepspeed"):
        raise UnsupportedError(f"launch=deepspeed is not possible: {refusal(config, 'deepspeed')}")
    if accelerator.num_processes > 1 and (quantization or "").startswith("torchao"):
        raise UnsupportedError(
            f"weights in model.quantization={quantization} can neither be sent from process to "
            "process nor cut up; use bnb_8bit, or one process"
        )
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


def start(seed: int, precision: str, launch: Launch | None = None) -> Accelerator:
    """Seed all random number generators and make the Accelerator of a run.

    Args:
        precision: "no" or "bf16", for autocast.
        launch: how processes share the work; None is DDP, or one process.
    """
    set_seed(seed)
    return make_accelerator(launch or Launch(), precision)
