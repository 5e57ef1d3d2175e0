"""DeepSpeed's ZeRO, stages 1 and 2: each process keeps a share of the optimizer's state.

DeepSpeed lays the trainable tensors of a parameter group out in one flat buffer, of which they
become views, and cuts it into equal shares. A process holds its share again, as the one tensor
that its optimizer is about; stage 2 also lets go of gradients that belong to other shares. A frozen
base stays whole on each process. Unlike the other engines this one waits for the device in each
step: DeepSpeed looks whether the gradient is finite, and makes no step if it is not.
"""

import logging
from collections import defaultdict
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn

from petl.distributed.engine import Engine
from petl.imports.extras import optional

COUNT = "step"  # the one entry of AdamW's state that is not about each number of a tensor
logger = logging.getLogger(__name__)


def refuse_to_compile() -> None:
    """Keep DeepSpeed from compiling an all-reduce of its own on CPUs, in place of gloo's.

    That needs a compiler and up to minutes, and where it was cut short a lock stays behind, for
    which every later run waits without an end. DeepSpeed has a table of what can be compiled.
    """
    ops: Any = optional("deepspeed.ops", "deepspeed")
    ops.__compatible_ops__ = {}


class ZeroEngine(Engine):
    """Drives DeepSpeed's engine, which Accelerate makes."""

    def wrap(self) -> nn.Module:
        refuse_to_compile()
        state: Any = self.accelerator.state
        state.distributed_type = DistributedType.DEEPSPEED  # autocast sets it back to the group's
        plugin = state.deepspeed_plugin
        plugin.deepspeed_config["gradient_clipping"] = self.max_norm or 0.0
        size = sum(tensor.numel() for tensor in self.tensors)  # the default takes 2 GB
        plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = size
        wrapped, _ = self.accelerator.prepare(self.model, self.optimizer)
        share = sum(flat.share.numel() for flat in flats_of(wrapped))
        logger.info("DeepSpeed: this process keeps the optimizer's state of %d of %d", share, size)
        return wrapped

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine."""
        return self.wrapped

    def passes(self, *, last: bool) -> AbstractContextManager[None]:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def step(self) -> Tensor:
        """As in `Engine`; without a step the norm is infinite."""
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.accelerator.device)

    @contextmanager
    def whole(self) -> Generator[None]:
        """Within it the optimizer is about the model's tensors, with their whole state.

        All processes must enter it. What is changed in it, in all of them alike, of the tensors as
        of the state, goes back into the shares.
        """
        optimizer, flats = self.optimizer, flats_of(self.deepspeed)
        state: dict[Any, Any] = defaultdict(dict)
        for group, flat in zip(optimizer.param_groups, flats, strict=True):
            group["params"] = flat.tensors
            state.update(flat.gather(optimizer.state[flat.share]))
        optimizer.state = state
        try:
            yield
        finally:
            shares: dict[Any, Any] = defaultdict(dict)
            for group, flat in zip(optimizer.param_groups, flats, strict=True):
                group["params"] = [flat.share]
                shares[flat.share] = flat.scatter(optimizer.state)
            optimizer.state = shares
            self.deepspeed.optimizer.refresh_fp32_params()  # the shares, from the model's tensors

    def release(self) -> None:
        self.accelerator.free_memory()  # and DeepSpeed's hooks
        for tensor in self.tensors:
            tensor.data = tensor.data.clone()  # out of the buffer


def flats_of(engine: Any) -> list["Flat"]:
    """What lies behind each parameter group of DeepSpeed's engine."""
    zero = engine.optimizer
    parts = zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
    return [Flat(*part) for part in zip(*parts, strict=True)]


class Flat:
    """A parameter group: its tensors, the buffer [N] that holds them, and our share of that."""

    def __init__(self, tensors: list[nn.Parameter], buffer: Tensor, share: nn.Parameter) -> None:
        self.tensors, self.buffer, self.share = list(tensors), buffer, share

    def part(self, whole: Tensor, tensor: Tensor) -> Tensor:
        """What of a tensor [N] belongs to one of the tensors, in its shape."""
        start = tensor.storage_offset() - self.buffer.storage_offset()
        return whole[start : start + tensor.numel()].view(tensor.shape)

    def gather(self, entries: dict[str, Tensor]) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The state of each tensor, from what this process's optimizer has of its share."""
        state: dict[nn.Parameter, dict[str, Tensor]] = {tensor: {} for tensor in self.tensors}
        for key, value in entries.items():
            whole = torch.empty_like(self.buffer, dtype=value.dtype)
            if key != COUNT:
                distributed.all_gather(self.shares_of(whole), value.contiguous())
            for tensor in self.tensors:
                own = value if key == COUNT else self.part(whole, tensor)
                state[tensor][key] = own.clone()
        return state if entries else {}

    def scatter(self, state: dict[Any, dict[str, Tensor]]) -> dict[str, Tensor]:
        """What this process's optimizer has of its share, from the state of each tensor."""
        entries: dict[str, Tensor] = {}
        for tensor in self.tensors:
            for key, value in state.get(tensor, {}).items():
                if key == COUNT:
                    entries[key] = value.clone()
                    continue
                whole = entries.setdefault(key, torch.zeros_like(self.buffer, dtype=value.dtype))
                self.part(whole, tensor).copy_(value)
        rank = distributed.get_rank()
        return {
            key: value if key == COUNT else self.shares_of(value)[rank].clone()
            for key, value in entries.items()
        }

    def shares_of(self, whole: Tensor) -> list[Tensor]:
        """A tensor [N] as the shares of all processes, which are views of it."""
        return list(whole.chunk(distributed.get_world_size()))
