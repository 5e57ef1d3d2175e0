"""DeepSpeed's ZeRO, stages 1 and 2: the optimizer state is sharded across processes.

DeepSpeed copies the trainable tensors of a parameter group into one flat buffer, of which they
become views, and cuts it into equal shards. Each process has a second copy of its shard, which is
the only parameter of its optimizer; stage 2 also frees the gradients of other shards. The frozen
base is replicated. Unlike the other engines this one synchronizes with the device in each step:
DeepSpeed checks if the gradient is finite, and skips the step if it is not.
"""

import logging
from collections import defaultdict
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn

from petl.system.imports.extras import optional
from petl.training.distributed.launch import StepEngine

Engine = Any  # objects of DeepSpeed, an optional package
State = dict[Tensor, dict[str, Tensor]]  # of an optimizer
COUNT = "step"  # the one entry of AdamW's state that is a scalar, not shaped as its parameter
logger = logging.getLogger(__name__)


def refuse_to_compile() -> None:
    """Keep DeepSpeed from compiling an all-reduce for CPUs; gloo's is used instead.

    Compilation needs a compiler and up to minutes, and if it is interrupted, its lock file makes
    every later run wait forever. The emptied table lists what can be compiled.
    """
    ops: Engine = optional("deepspeed.ops", "deepspeed")
    ops.__compatible_ops__ = {}


class ZeroEngine(StepEngine):
    """The engine of `launch=deepspeed`, around DeepSpeed's own, which Accelerate makes."""

    def wrap(self) -> nn.Module:
        refuse_to_compile()
        state: Engine = self.accelerator.state
        state.distributed_type = DistributedType.DEEPSPEED  # Accelerator.autocast resets it
        plugin = state.deepspeed_plugin
        plugin.deepspeed_config["gradient_clipping"] = self.max_norm or 0.0
        size = sum(tensor.numel() for tensor in self.tensors)  # the default allocates 2 GB
        plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = size
        wrapped, _ = self.accelerator.prepare(self.model, self.optimizer)
        shard = sum(group.shard.numel() for group in flat_groups(wrapped))
        logger.info(
            "DeepSpeed: this process holds the optimizer state of %d of %d parameters", shard, size
        )
        return wrapped

    @property
    def deepspeed(self) -> Engine:
        """DeepSpeed's engine, which computes the forward pass."""
        return self.wrapped

    def passes(self, *, last: bool) -> AbstractContextManager[None]:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def step(self) -> Tensor:
        """As `StepEngine.step`; if DeepSpeed skips the step, the norm is infinite."""
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.accelerator.device)

    @contextmanager
    def gathered(self) -> Generator[None]:
        """Inside the block, the optimizer has the model's tensors and their complete state.

        All processes must enter the block and make the same changes, of tensors and state, which
        are sharded again at its end.
        """
        optimizer, flats = self.optimizer, flat_groups(self.deepspeed)
        state: State = defaultdict(dict)
        for group, flat in zip(optimizer.param_groups, flats, strict=True):
            group["params"] = flat.tensors
            state |= flat.gather(optimizer.state[flat.shard])
        optimizer.state = state
        try:
            yield
        finally:
            sharded: State = defaultdict(dict)
            for group, flat in zip(optimizer.param_groups, flats, strict=True):
                group["params"] = [flat.shard]
                sharded[flat.shard] = flat.scatter(optimizer.state)
            optimizer.state = sharded
            self.deepspeed.optimizer.refresh_fp32_params()  # shards, from the model's tensors

    def release(self) -> None:
        self.accelerator.free_memory()  # also removes DeepSpeed's hooks
        for tensor in self.tensors:
            tensor.data = tensor.data.clone()  # out of the buffer


def flat_groups(engine: Engine) -> list["FlatGroup"]:
    """Return the flat buffer of each parameter group of DeepSpeed's engine."""
    zero = engine.optimizer
    parts = zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
    return [FlatGroup(*part) for part in zip(*parts, strict=True)]


class FlatGroup:
    """A parameter group: its tensors, the buffer [N] of all of them, and this process's shard."""

    def __init__(self, tensors: list[nn.Parameter], buffer: Tensor, shard: nn.Parameter) -> None:
        self.tensors, self.buffer, self.shard = list(tensors), buffer, shard

    def part(self, full: Tensor, tensor: Tensor) -> Tensor:
        """Return the view of `full`, [N], at the place of one of the tensors, in its shape."""
        start = tensor.storage_offset() - self.buffer.storage_offset()
        return full[start : start + tensor.numel()].view(tensor.shape)

    def gather(self, entries: dict[str, Tensor]) -> State:
        """Return the optimizer state of each tensor, gathered from the states of all shards."""
        state: State = {tensor: {} for tensor in self.tensors}
        for key, value in entries.items():
            full = torch.empty_like(self.buffer, dtype=value.dtype)
            if key != COUNT:
                distributed.all_gather(self.shards_of(full), value.contiguous())
            for tensor in self.tensors:
                own = value if key == COUNT else self.part(full, tensor)
                state[tensor][key] = own.clone()
        return state if entries else {}

    def scatter(self, state: State) -> dict[str, Tensor]:
        """Return the optimizer state of this process's shard, from the state of each tensor."""
        entries: dict[str, Tensor] = {}
        for tensor in self.tensors:
            for key, value in state.get(tensor, {}).items():
                if key == COUNT:
                    entries[key] = value.clone()
                    continue
                full = entries.setdefault(key, torch.zeros_like(self.buffer, dtype=value.dtype))
                self.part(full, tensor).copy_(value)
        rank = distributed.get_rank()
        return {
            key: value if key == COUNT else self.shards_of(value)[rank].clone()
            for key, value in entries.items()
        }

    def shards_of(self, full: Tensor) -> list[Tensor]:
        """Return a tensor [N] as the shards of all processes, which are views of it."""
        return list(full.chunk(distributed.get_world_size()))
