"""Measure the memory of a forward and backward pass from tensor shapes, without data.

Under `FakeTensorMode` a pass calls the same operations as a real one, in the same order, so the
bytes alive at each moment are those of a real pass: activations, casts of autocast, recomputation
under gradient checkpointing, gradients. Nothing is allocated or computed. `.item()` on a FakeTensor
returns 1 here, so that data-dependent branches run, such as one that randomly skips an adapter.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import patch_environment
from peft import PeftModel
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from petl.core.compat import BaseTunerLayer
from petl.core.experts.forward import on_shapes
from petl.core.experts.lora import FusedExperts
from petl.core.layers.block import BlockAdapters
from petl.core.parameters import LiveBytes
from petl.core.registry import refusal
from petl.core.support import Capability
from petl.errors import InputError, UnsupportedError, first_line


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one pass, weights and optimizer left out.

    Attributes:
        kept: alive between forward and backward: saved activations.
        peak: maximum alive at any moment, gradients included.
        operations: floating-point operations of its matrix products.
    """

    kept: int
    peak: int
    operations: int = 0


@contextmanager
def without_values(model: PeftModel, device: torch.device) -> Generator[None]:
    """Replace the model's tensors by FakeTensors on `device`, in the block.

    The model cannot be used afterwards.
    """
    # real inputs: constants that a forward pass makes of Python numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_shapes(model)
        replaced: dict[Tensor, Tensor] = {}  # tensors that modules share stay shared
        for module in model.modules():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                if tensor not in replaced:
                    empty = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    replaced[tensor] = empty
                setattr(module, name, replaced[tensor])
        yield


class Operations(TorchDispatchMode):
    """Counts floating-point operations of matrix products.

    Unlike torch's FlopCounterMode it sets no global hooks of modules, with which fused layers would
    compute in another way, and decomposes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def pass_memory(
    model: PeftModel,
    batch: Mapping[str, Tensor],
    device: torch.device,
    *,
    bf16: bool = False,
    trains: bool = True,
) -> PassMemory:
    """Return the bytes of a forward and backward pass; call it inside `without_values`.

    Args:
        model: on FakeTensors.
        batch: inputs with labels; only their shapes and dtypes matter.
        device: the device of the model.
        bf16: compute under autocast to bfloat16.
        trains: False for a forward pass alone, as in an evaluation.

    Raises:
        UnsupportedError: the pass depends on values of tensors, not on shapes alone.
    """
    inputs = {name: torch.empty_like(tensor, device=device) for name, tensor in batch.items()}
    # there already: not counted as memory of the pass
    before = (*model.parameters(), *model.buffers(), *inputs.values())
    try:
        with Operations() as counter, LiveBytes(before) as live:
            with (
                torch.set_grad_enabled(trains),
                torch.autocast(device.type, torch.bfloat16, enabled=bf16),
                # of values that are not there: transformers counts the tokens of images
                patch_environment(transformers_disable_torch_check="1"),
            ):
                loss = model(**inputs).loss
            # between forward and backward, only what autograd saved is alive
            kept = live.now
            if trains:
                loss.backward()
    except InputError:
        raise  # the method refuses such a pass
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnsupportedError(
            f"the pass of {type(model.get_base_model()).__name__} depends on the values of "
            f"tensors, not only on shapes ({first_line(error)})"
        ) from error
    return PassMemory(kept, live.peak, counter.total)


def takes_mixed_batches(model: PeftModel) -> bool:
    """Return True if the rows of a batch may go through different adapters (`adapter_names`).

    Runs one layer of each class; call it inside `without_values`. A tuner without the hook ignores
    the argument, and some layers raise.
    """
    if refusal(model.active_peft_config, Capability.MIXED_BATCH):
        return False
    if not hasattr(type(model.base_model), "_enable_peft_forward_hooks"):
        return False
    # blocks and experts need more arguments than hidden states, and always take the names
    layers: dict[type, object] = {
        type(m): m
        for m in model.modules()
        if isinstance(m, BaseTunerLayer) and not isinstance(m, BlockAdapters | FusedExperts)
    }
    # the same adapter twice: the argument matters, not the result
    names = [model.active_adapter] * 2
    try:
        for layer in layers.values():
            run_mixed(layer, names)
    except (TypeError, ValueError, AttributeError, RuntimeError):  # layers without the argument
        return False
    return True


@torch.no_grad()
def run_mixed(layer: Any, names: list[Any]) -> None:
    """Run a layer on one row for each of `names`, as its block would."""
    # for dtype and device
    weight = next(layer.get_base_layer().parameters())
    like = {"dtype": weight.dtype, "device": weight.device}
    for capture in getattr(layer, "captures", {}).values():
        # the hook that hands a parallel adapter its input in a real pass
        capture(layer, (torch.empty(len(names), 3, layer.out_features, **like),), {})
    layer(torch.empty(len(names), 3, layer.in_features, **like), adapter_names=names)
