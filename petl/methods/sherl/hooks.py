"""Hooks of blocks: they collect features, and feed the side networks' results to late blocks.

They run outside of the checkpointed calls of the blocks (checked with transformers 5.24), so that
nothing is computed twice and the late blocks get an input with a gradient.
"""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from petl.core.layers.block import (
    adapters_of,
    place_of_argument,
    split_arguments,
    with_argument,
)
from petl.core.layers.context import ForwardContext
from petl.core.types import Record
from petl.errors import InputError
from petl.methods.sherl.adapter import SherlAdapter

MEMORY = "encoder_hidden_states"  # the argument of decoder blocks


class BlockStack:
    """The hooks of one list of blocks, for the adapters of one of them, the host.

    Attributes:
        path, host: the block that holds the adapters.
        around: the host and the modules that contain it, from the inside.
        names: the adapters that these hooks serve; the host may have others, with other plans.
        memories: by adapter name, norm(y) of the encoder's last pass.
    """

    def __init__(
        self, path: str, model: nn.Module, context: ForwardContext, names: set[str]
    ) -> None:
        parts = path.split(".")
        inner = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
        self.around = [model.get_submodule(name) for name in inner]
        self.path, self.host, self.context, self.names = path, self.around[0], context, names
        self.memories: dict[str, Tensor] = {}

    def __getstate__(self) -> Record:
        # a memory is a part of a graph, which cannot be copied
        return {**self.__dict__, "memories": {}}

    @property
    def key(self) -> tuple[str, str]:
        """Key of the features in the state of the forward pass."""
        return "sherl", self.path

    def active(self) -> SherlAdapter | None:
        """Return the adapter that computes now, or None."""
        layer = adapters_of(self.host)
        if layer is None or layer.disable_adapters:
            return None
        picked = layer.pick([name for name in layer.active_adapters if name in self.names])
        return cast(Any, next((adapter for _, adapter in picked), None))

    def start(self, block: nn.Module, args: object, kwargs: object) -> Any:
        """Pre-hook of block 0: cut the graph, and begin to collect features."""
        self.memories.clear()  # of another input
        if self.active() is None:
            return None
        x, args, kwargs = _detached(args, kwargs)
        self.context.state[self.key] = [x]
        return args, kwargs

    def memory(self, rows: int) -> Tensor:
        """Return norm(y) of the encoder's last pass for so many rows of the decoder.

        Raises:
            InputError: the encoder has not run with this adapter, or with other rows.
        """
        adapter = self.active()
        memory = None if adapter is None else self.memories.get(adapter.info.adapter_name)
        if memory is None or rows % len(memory):
            seen = "not run" if memory is None else f"run with {len(memory)} rows"
            raise InputError(
                f"the decoder has {rows} rows, and the encoder, whose blocks a side network reads, "
                f"has {seen} with this adapter; call the model with input_ids, not with "
                "encoder_outputs alone"
            )
        # beam search repeats rows behind the encoder
        return memory.repeat_interleave(rows // len(memory), dim=0)

    def cut(self, block: nn.Module, args: object, kwargs: object) -> Any:
        """Pre-hook of block 0 of a stack without a side network: cut the graph."""
        return None if self.active() is None else _detached(args, kwargs)[1:]

    def taken(self) -> list[Tensor]:
        """Return the collected features, and forget them."""
        features = self.context.state.pop(self.key, None)
        if features is None:
            raise InputError(
                f"{self.path} has a side network that reads the blocks before it, which have not "
                "run; call the model"
            )
        return features


class Collect:
    """Forward hook of a block: append its output to the features, and after the last fuse them."""

    def __init__(self, stack: BlockStack, index: int, *, ends: bool = False) -> None:
        self.stack, self.index, self.ends = stack, index, ends

    def __call__(self, block: nn.Module, args: object, output: Any) -> None:
        stack, adapter = self.stack, self.stack.active()
        if adapter is None or self.index not in adapter.sides:
            return
        last = (output[0] if isinstance(output, tuple | list) else output).detach()
        stack.context.state[stack.key].append(last)
        if self.ends:  # the encoder's
            memory = adapter(stack.taken(), last)
            gather_before_backward(stack.around, memory)  # the encoder's output has no graph
            stack.memories[adapter.info.adapter_name] = memory


class SideFeed:
    """Forward pre-hook of a late block: replace the first one's input, and the encoder's output."""

    def __init__(
        self, block: nn.Module, stack: BlockStack, encoder: BlockStack | None, *, is_host: bool
    ) -> None:
        self.stack, self.encoder, self.is_host = stack, encoder, is_host
        self.place = 0 if encoder is None else place_of_argument(block, MEMORY)

    def __call__(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        adapter = self.stack.active()
        if adapter is None:
            return None
        if self.is_host:
            x, args, kwargs = _detached(args, kwargs)
            args = (adapter(self.stack.taken(), x), *args[1:])
        if self.encoder is None:
            return args, kwargs
        memory = self.encoder.memory(len(args[0] if args else next(iter(kwargs.values()))))
        return with_argument(args, kwargs, MEMORY, self.place, memory)


def _detached(args: Any, kwargs: Any) -> tuple[Tensor, Any, Any]:
    """Return the hidden states, and the arguments of a block, without their graph."""
    x, args, kwargs, _ = split_arguments(args, kwargs)
    x = x.detach()
    return x, (x, *args), kwargs


def gather_before_backward(modules: Iterable[nn.Module], tensor: Tensor) -> None:
    """Make the backward pass through `tensor` find the parameters that it was computed from.

    FSDP2 gathers the shards of a module in backward when the gradient of the module's output
    arrives. Where a hook computes `tensor` from parameters of a module whose own output has no
    graph, they would stay freed. Their gradients are averaged at the end of the backward pass.

    Args:
        modules: the module that has the parameters, then those around it, from the inside.
        tensor: which depends on them.
    """
    sharded = next((module for module in modules if isinstance(module, FSDPModule)), None)
    if sharded is not None and tensor.requires_grad:
        tensor.register_hook(lambda grad: sharded.unshard())
