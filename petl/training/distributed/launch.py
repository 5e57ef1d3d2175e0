"""How the processes of a run divide its work: `+launch=ddp|fsdp|deepspeed`, through Accelerate.

Without `launch` it is ddp. A launcher (`torchrun`, `accelerate launch`) starts the processes, on
one machine or several; `launch` defines how they divide model, gradients and optimizer state.
`StepEngine` computes backward passes and optimizer steps on them.
"""

import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    set_seed,
)
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from petl.core.parameters import quantization_of, trainable
from petl.core.support import BASES, Capability, Lacks
from petl.core.types import Settings, base_of
from petl.errors import InputError, choose
from petl.system.collectives import is_sharded, to_full, to_shards
from petl.system.imports.extras import need_extra
from petl.system.values import read_fields

# environment variables of `accelerate launch` that choose a kind
REQUESTED = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
# environment variables of `accelerate launch` that set up DeepSpeed, with the values of a run
ZERO_REQUESTED = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "{stage}",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
}


def several_torchao(launch: "Launch") -> str:
    """Why weights of torchao cannot be in several processes; "": there is one."""
    if number_of_processes() < 2:
        return ""
    return "such weights can neither be broadcast nor sharded; use bnb_8bit, or one process"


@dataclass(frozen=True)
class Launch:
    """The settings under `launch`, explained in configs/launch; this one is DDP."""

    lacks: ClassVar[Lacks] = {Capability.BASE_TORCHAO: several_torchao}

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

    def need_processes(self, what: str) -> None:
        """Raise InputError if there is a single process, in which nothing can be sharded."""
        if number_of_processes() < 2:
            raise InputError(
                f"launch={self.name} shards {what} across processes, and there is "
                f"{number_of_processes()} (WORLD_SIZE): start several by torchrun "
                "--nproc_per_node N -m petl train ..., or leave +launch out"
            )


@dataclass(frozen=True)
class FSDP(Launch):
    """FSDP2: parameters, gradients and optimizer state are sharded across processes."""

    lacks = dict.fromkeys(BASES, "such weights cannot be sharded; use launch=ddp")

    reshard_after_forward: bool = True

    def make(self, *, cpu: bool, precision: str) -> Accelerator:
        self.need_processes("the model")
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
        self.need_processes("the optimizer state")
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


def read_launch(settings: Settings | None) -> Launch:
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
    if precision == "bf16":
        # not imported by runs in float32
        resolve_name("petl.training.distributed.precision:check_bf16")()
    # a process may run many jobs of a sweep: the settings change, the process group stays
    AcceleratorState._reset_state()
    GradientState._reset_state()
    on_cpu = number_of_processes() > 1 and not torch.accelerator.is_available()
    return launch.make(cpu=on_cpu, precision=precision)


def is_zero(accelerator: Accelerator) -> bool:
    """Return True if DeepSpeed trains."""
    return hasattr(accelerator, "deepspeed_engine_wrapped")


def start(seed: int, precision: str, launch: Launch | None = None) -> Accelerator:
    """Seed all random number generators and make the Accelerator of a run.

    Args:
        precision: "no" or "bf16", for autocast.
        launch: how processes divide the work; None is DDP, or one process.
    """
    set_seed(seed)
    return make_accelerator(launch or Launch(), precision)


@contextmanager
def accelerate_restored() -> Generator[None]:
    """Restore the state that all Accelerators of a process share, if there is one, after the block.

    The precision and the accumulation of a caller's own would become those of the one made here.
    """
    shared = [state._shared_state for state in (AcceleratorState, GradientState)]
    kept = [dict(state) for state in shared]
    try:
        yield
    finally:
        for state, values in zip(shared, kept, strict=True):
            if values:
                state.clear()
                state.update(values)


# Training


class StepEngine:
    """Drives a model and its optimizer for the training loop.

    Attributes:
        wrapped: the module to call for a forward pass, in place of the model.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: Optimizer,
        max_norm: float | None,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.optimizer, self.max_norm = model, optimizer, max_norm
        self.accelerator = accelerator
        self.tensors = [parameter for _, parameter in trainable(model)]
        self.wrapped: nn.Module = self.wrap()

    def wrap(self) -> nn.Module:
        """Return the module that computes the forward pass: the model itself, or DDP around it."""
        return self.model if is_sharded(self.model) else self.accelerator.prepare(self.model)

    def passes(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch's passes; with the last, processes average their gradients."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def step(self) -> Tensor:
        """Clip the gradient to `max_norm` and step the optimizer; return the norm before, 0-d."""
        # with DTensors both norms are over all shards
        if self.max_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.tensors if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(self.tensors, self.max_norm)
        self.optimizer.step()
        return to_full(norm)

    def gathered(self) -> AbstractContextManager[None]:
        """`gathered` for the model and its optimizer."""
        return gathered(self.model, self.optimizer)

    def release(self) -> None:
        """Remove from the model what only training needs."""
        if not is_sharded(self.model):
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)


def on_device(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Move the base model to the device of this process, unless FSDP2 will shard it.

    A quantized model was loaded onto the device already, and must not be moved.
    """
    stays = accelerator.is_fsdp2 or quantization_of(model)
    return model if stays else model.to(accelerator.device)


def shard(model: PeftModel, accelerator: Accelerator) -> None:
    """Shard the model across processes, block by block, if the run uses FSDP2.

    Not by Accelerate, which breaks an embedding that an encoder and a decoder share. From here on
    parts of the model must not be called alone: shards are gathered in the forward pass of the
    complete model, or in `generate`, in which every process must take part.
    """
    if not accelerator.is_fsdp2:
        return
    for _, parameter in trainable(model):  # FSDP2 needs one dtype for all that trains in a group
        parameter.data = parameter.data.float()
    plugin: Any = accelerator.state.fsdp_plugin
    base = base_of(model)
    # inner modules first, as fully_shard requires
    for part in parts(model):
        fully_shard(part, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(model)
    if base.can_generate():  # generate does not call the model's own forward
        register_fsdp_forward_method(model, "generate")


def parts(model: PeftModel) -> list[nn.Module]:
    """Return the modules that FSDP2 gathers one by one: blocks and the token embedding.

    An embedding that shares its weight with another module stays in the group of the model.
    """
    from petl.core.model.structure import blocks  # of FSDP2 alone

    base = base_of(model)
    found = [block for _, block in blocks(model)]
    try:
        embedding = base.get_input_embeddings()
    except NotImplementedError:  # a model of raw audio has none
        return found
    every = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    if isinstance(embedding, nn.Embedding) and sum(p is embedding.weight for p in every) == 1:
        found.append(embedding)
    return found


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass without a backward pass has left gathered.

    Until then the outermost modules hold other parameters than the sharded ones of an optimizer.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module, optimizer: Optimizer | None = None) -> Generator[None]:
    """Inside the block, gather trainable parameters and optimizer state to plain tensors.

    All processes must enter the block and make the same changes, which are sharded again at its
    end. No forward pass is allowed in it. Without sharding it does nothing.
    """
    reshard(model)
    # every place of a parameter: tied parameters have several
    places: list[tuple[nn.Module, str, Any]] = [
        (owner, name, parameter)
        for owner in model.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor) and parameter.requires_grad
    ]
    full = {shard: nn.Parameter(shard.detach().full_tensor()) for *_, shard in places}
    # FSDP2's hooks after loading a state dict expect shards
    hooks = {owner: owner._load_state_dict_post_hooks for owner, *_ in places}
    for owner, name, shard in places:
        owner._parameters[name] = full[shard]
        owner._load_state_dict_post_hooks = OrderedDict()
    _exchange(optimizer, full, lambda value, _: to_full(value))
    try:
        yield
    finally:
        for owner, name, shard in places:
            shard.data.copy_(to_shards(full[shard].detach(), shard))
            owner._parameters[name] = shard
            owner._load_state_dict_post_hooks = hooks[owner]
        back = {parameter: shard for shard, parameter in full.items()}
        _exchange(optimizer, back, to_shards)


def _exchange(
    optimizer: Optimizer | None,
    values: Mapping[Any, nn.Parameter],
    convert: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Replace the parameters of an optimizer, and convert its state accordingly."""
    if optimizer is None or not values:
        return
    for group in optimizer.param_groups:
        group["params"] = [values[parameter] for parameter in group["params"]]
    # SM3 of SparseAdapter keeps its complete state on every process
    is_sharded_state = not getattr(optimizer, "has_whole_state", False)
    # torch optimizers create the state of a new parameter on access
    state: defaultdict[Tensor, dict[str, object]] = defaultdict(dict)
    for parameter, entries in optimizer.state.items():
        state[values[parameter]] = {
            key: convert(value, values[parameter])
            if is_sharded_state and isinstance(value, Tensor)
            else value
            for key, value in entries.items()
        }
    optimizer.state = state
