"""The parameters of a model: which train, how they are quantized; bytes of tensors alive."""

import math
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer, TrainableTokensLayer
from petl.errors import InputError, UnsupportedError

Named = tuple[str, nn.Parameter]


def trainable(model: nn.Module) -> Iterator[Named]:
    """Yield name and tensor of every trainable parameter of the model."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def adapter_parameters(model: PeftModel) -> int:
    """Return the number of parameters of the adapter as saved after training, without heads."""
    # of the class: PEFT's tuners pass unknown attributes on to the base model
    planned_parameters = getattr(type(model.base_model), "planned_parameters", None)
    planned = None if planned_parameters is None else planned_parameters(model.base_model)
    if planned is not None:
        return planned
    # PEFT's methods: all that trains but heads
    own = (p for name, p in trainable(model) if "modules_to_save" not in name.split("."))
    return sum(parameter.numel() for parameter in own)


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Return, for each module with a tied weight, the name of another place that has it too."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        # children in all places: one module may stand in several, of which one has an adapter
        for name, child in module._modules.items():
            # its own: adapted layers pass on that of their base layer
            weight = None if child is None else child._parameters.get("weight")
            if weight is not None:
                owners.setdefault(id(weight), []).append(f"{path}.{name}" if path else name)
    return {
        name: names[0] if name != names[0] else names[1]
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


def refuse_shared_targets(model: nn.Module) -> None:
    """Raise UnsupportedError for an adapted layer that shares its weight with another."""
    tied = shared_weights(model)
    for path, layer in model.named_modules():
        # PEFT only warns
        # rows of tokens are meant to change in all of them
        is_tuned = isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)
        if is_tuned and f"{path}.base_layer" in tied:
            raise UnsupportedError(
                f"{path} shares its weight with {tied[f'{path}.base_layer']}, which merging would "
                "change as well; keep the adapter, or untie the weights before training"
            )


def max_positions(model: PreTrainedModel) -> int | None:
    """The maximum number of tokens of a sequence; None if the model has no limit."""
    for name, module in model.named_modules():
        # a learned table is the limit, even if the config has another number
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its relatives number positions from after the padding entry
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    return positions_in(model.config)


def positions_in(config: PretrainedConfig) -> int | None:
    """The maximum number of tokens of a sequence that a config names; None: it names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def is_norm(module: nn.Module) -> bool:
    """Return True for a norm with a 1-D weight, or PEFT's trained copy of one."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1


def quantization_of(model: nn.Module) -> str:
    """Return how the weights of a model are quantized: "4bit", "8bit", "torchao", ...; "" if not.

    The first three are capabilities, see petl/core/support.py.
    """
    loaded = model
    # set by transformers' bitsandbytes loader
    if getattr(loaded, "is_loaded_in_4bit", False):
        return "4bit"
    if getattr(loaded, "is_loaded_in_8bit", False):
        return "8bit"
    method = getattr(loaded, "quantization_method", None)
    return "" if method is None else str(getattr(method, "value", method))


def check_module(model: object, function: str) -> None:
    """Raise InputError if the model that a public function is called with is no model."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{function} needs a model, a torch.nn.Module, and got {type(model).__name__}: load it "
            "first, such as by AutoModelForCausalLM.from_pretrained(NAME)"
        )


# Bytes of tensors


def refuse_adapted(base: nn.Module) -> None:
    """Raise InputError if a base model contains an adapter: PEFT would put another one on it."""
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise InputError(
            f"the base model, a {type(base).__name__}, contains an adapter already (wrapping "
            "changes a model in place); use a new base model, or the PeftModel to add another "
            "adapter to it"
        )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors created in its block that are still alive.

    Tensors in `before`, and views of them, are not counted. Tensors on the meta device are.

    Attributes:
        now: bytes alive.
        peak: maximum of `now`.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        # storages, since views share their bytes
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # `.item()`, which would raise on a FakeTensor
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # sparse tensors have no single storage
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._before or key in self._alive:
            return

        def on_free(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, on_free)
        self.now += size
        self.peak = max(self.peak, self.now)


class TooManyBytes(MemoryError):
    """More bytes than `limit` would be alive; the argument is their number."""


class LimitedBytes(LiveBytes):
    """Raises LimitExceeded before tensors that are made in its block have more bytes than `limit`.

    Only tensors of a requested size count, as `torch.empty` makes them: results that depend on
    other tensors, such as views and copies of a model's weights, do not.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        more = requested_bytes(func, args, kwargs or {})
        if not more:
            return func(*args, **(kwargs or {}))
        if self.now + more > self.limit:
            raise TooManyBytes(self.now + more)
        return super().__torch_dispatch__(func, types, args, kwargs)


def requested_bytes(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes of the tensor that an operation such as `torch.empty` makes, else 0."""
    names = [argument.name for argument in func._schema.arguments]
    is_method = func._schema.name.startswith("aten::new_")  # of a tensor, which comes first
    if "size" not in names[: 1 + is_method]:
        return 0
    size = args[names.index("size")]
    dtype = kwargs.get("dtype") or (args[0].dtype if is_method else torch.get_default_dtype())
    return math.prod(size) * dtype.itemsize


def check_memory(what: str, needed: int, remedy: str) -> None:
    """Raise InputError if `what` needs more bytes than the memory of this machine."""
    total = psutil.virtual_memory().total
    if needed > total:
        raise InputError(
            f"{what} needs at least {needed / 1e9:,.0f} GB, more than the {total / 1e9:,.0f} GB of "
            f"memory of this machine: {remedy}"
        )


@contextmanager
def within_memory(what: str, remedy: str) -> Generator[None]:
    """Inside the block, refuse tensors that exceed the memory of this machine.

    Raises:
        InputError: `what` has more bytes than the machine; those that do not fit are not allocated.
    """
    try:
        with LimitedBytes(psutil.virtual_memory().total):
            yield
    except TooManyBytes as error:
        check_memory(what, error.args[0], remedy)


def buffer_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())
