"""Models without data: what follows from the shapes of tensors alone.

Under `FakeTensorMode` a forward and backward pass calls what a real one calls, in the same order,
so the bytes alive at each moment are those of a real pass: activations, casts of autocast, what is
recomputed under gradient checkpointing, gradients. Nothing is allocated and nothing computed. Where
the pass asks for a value, as for a draw that switches an adapter off, the answer is 1.
"""

import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from petl.core.compat import BaseTunerLayer
from petl.core.registry import build_config, needs_calibration, wrap
from petl.core.spec.method import modifies_base_weights
from petl.errors import InputError, UnsupportedError, first_line


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one forward and backward pass, weights and optimizer left out.

    Attributes:
        kept: alive between the two, for the backward pass.
        peak: the most that was alive at once, gradients included.
    """

    kept: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside its block that are still alive.

    Those in `before`, and views of them, are not counted.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._before or key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def without_data(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields with a start that needs neither data nor weights, and what to say about it."""
    config = build_config(**fields)
    start = getattr(config, "init_lora_weights", True)
    if not isinstance(start, str) or not (
        needs_calibration(config) or modifies_base_weights(config)
    ):
        return dict(fields), []
    note = (
        f"init_lora_weights={start} looks at weights or data; shapes are those of the plain start"
    )
    return {**fields, "init_lora_weights": True}, [note]


def on_shapes(build: Callable[[], PreTrainedModel], fields: Mapping[str, Any]) -> PeftModel:
    """`petl.wrap` with `fields` around the meta-device model that `build` makes.

    A method that computes with the weights when it starts gets memory for them, but no values.
    """
    try:
        return wrap(build(), **fields)
    except (InputError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, InputError) and not isinstance(error.__cause__, NotImplementedError):
            raise
        # else it is what torch says when values on the meta device are asked for
        base: Any = build().to_empty(device="cpu")
        base.tie_weights()
        return wrap(base, **fields)


@contextmanager
def without_values(model: PeftModel, device: torch.device) -> Generator[None]:
    """In the block the model computes on `device`, shapes only; afterwards it is of no more use."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[Tensor, Tensor] = {}  # tensors that modules share stay shared
        for module in model.modules():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                if tensor not in made:
                    empty = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[tensor] = empty
                setattr(module, name, made[tensor])
        yield


def pass_memory(
    model: PeftModel, batch: Mapping[str, Tensor], device: torch.device, *, bf16: bool = False
) -> PassMemory:
    """Bytes of a forward and backward pass; to be called inside `without_values`.

    Args:
        batch: inputs with labels; only their shapes and types count.
        device: that of the model.
        bf16: compute under autocast to bfloat16.

    Raises:
        UnsupportedError: the course of the pass depends on values, so that shapes do not tell.
    """
    inputs = {name: torch.empty_like(tensor, device=device) for name, tensor in batch.items()}
    before = (*model.parameters(), *model.buffers(), *inputs.values())
    try:
        with LiveBytes(before) as live:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(**inputs).loss
            kept = live.now
            loss.backward()
    except InputError:
        raise  # the method refuses such a pass
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnsupportedError(
            f"the pass of {type(model.get_base_model()).__name__} depends on the values of "
            f"tensors, not only on shapes ({first_line(error)})"
        ) from error
    return PassMemory(kept, live.peak)


def takes_mixed_batches(model: PeftModel) -> bool:
    """Whether the rows of one batch may go through different adapters (`adapter_names`).

    One layer of each kind is asked, to be called inside `without_values`. A tuner without the hook
    would drop the argument, and some layers refuse it.
    """
    if not hasattr(type(model.base_model), "_enable_peft_forward_hooks"):
        return False
    layers: dict[type, Any] = {type(m): m for m in model.modules() if isinstance(m, BaseTunerLayer)}
    names = [model.active_adapter] * 2
    try:
        for layer in layers.values():
            ask_for_mixed(layer, names)
    except (TypeError, ValueError, AttributeError):  # what layers raise that do not know it
        return False
    return True


@torch.no_grad()
def ask_for_mixed(layer: Any, names: list[Any]) -> None:
    """Run a layer on one row for each of `names`, as its block would."""
    weight = next(layer.get_base_layer().parameters())
    like = {"dtype": weight.dtype, "device": weight.device}
    for capture in getattr(layer, "feeds", {}).values():
        capture(layer, (torch.empty(len(names), 3, layer.out_features, **like),), {})
    layer(torch.empty(len(names), 3, layer.in_features, **like), adapter_names=names)
