"""Quantized weights: parameters that are read as quantized values while an adapter computes.

The latent weights stay parameters of the inner method, under its names, for the optimizer and for
saving. The class of each module that owns or uses some is replaced by a subclass, whose
`__getattr__` returns the quantized value while a computing method (`forward`, `delta`, ...) of the
adapter runs. So any method can be quantized without code of its own.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from petl.core.layers.class_swap import SwappedClass, swap_class
from petl.core.layers.context import ForwardContext, num_processes
from petl.core.layers.layer import HALF
from petl.core.tuners.gradients import never_updated
from petl.core.types import Arguments, Record
from petl.errors import InputError
from petl.ops.quantize import decode, decode_latent, encode, packed_bytes, quantize, quantize_each

COMPUTING = (
    "forward", "with_base", "factors", "tensors", "delta", "get_delta_weight", "merge", "unmerge",
    "matrices", "generated",
)  # fmt: skip

Packed = tuple[Tensor, Tensor]  # codes and statistics, as a file has them


class CachedValue(NamedTuple):
    """A quantized value, valid as long as its sources have these versions and data pointers."""

    sources: Sequence[Tensor]
    states: list[tuple[int, int]]
    value: Tensor

    @classmethod
    def of(cls, sources: Sequence[Tensor], value: Tensor) -> "CachedValue":
        """A value that was computed from the present contents of `sources`."""
        return cls(sources, [(t._version, t.data_ptr()) for t in sources], value)

    def is_valid(self, sources: Sequence[Tensor]) -> bool:
        """True if the value is that of these sources, unchanged."""
        return all(
            old is new and state == (new._version, new.data_ptr())
            for old, new, state in zip(self.sources, sources, self.states, strict=True)
        )


class Quantizer:
    """Quantizes the weights of a tuner and caches the values; shared by them, never saved.

    A training forward quantizes all weights at its beginning, those of one shape together: layer by
    layer it would take some fifty small kernels per layer, and quantize shared pools in each layer.
    Under reentrant checkpointing values cannot be shared (each segment has its own backward pass),
    and under torch.compile they need not be, so there each read quantizes.

    Attributes:
        depth: number of running computing methods; reads return quantized values if it is not 0.
        quantized_weights: the quantized weights of each adapter, by adapter name.
    """

    def __init__(self, context: ForwardContext, tuner: nn.Module) -> None:
        self.context, self.tuner = context, tuner
        self.depth = 0
        self.quantized_weights: dict[str, list[QuantizedWeight]] = {}
        self._cache: dict[bool, dict[int, CachedValue]] = {False: {}, True: {}}  # by grad mode, id
        self._reentrant = False  # whether reentrant checkpointing was noticed in this forward
        self._warned = False

    def __getstate__(self) -> Record:
        """State for copies and pickles, without the cache, whose values have a graph."""
        return {**self.__dict__, "depth": 0, "_cache": {False: {}, True: {}}}

    def begin(self, model: nn.Module, args: object) -> None:
        """Forward pre-hook of the base model: quantize all weights for a training forward."""
        if torch.compiler.is_compiling():
            return
        if (
            self.context.recording or num_processes() > 1
        ):  # FSDP fills weights without a new version
            self._cache[False].clear()
        if torch.is_grad_enabled():  # without, a backward pass may still need the cached values
            self._reentrant = False
            self._cache[True] = self._quantize_all() if self.context.recording else {}

    def _quantize_all(self) -> dict[int, CachedValue]:
        lists = self.quantized_weights.values()
        trained = [w for weights in lists for w in weights if w.weight.requires_grad]
        if any(quantized.packed is not None for quantized in trained):
            names = sorted({w.adapter_name for w in trained if w.packed is not None})
            raise InputError(
                f"adapter {names[0]!r} was loaded from a packed file for inference and cannot be "
                "trained; load it with is_trainable=True, or better from a file saved with "
                "save_format='latent'"
            )
        # counted by petl for every tuner; a copy of a model is not
        stepless = [w.adapter_name for w in trained if w.takes_steps]
        if stepless and never_updated(self.tuner):
            raise InputError(
                f"adapter {stepless[0]!r} has steps=pv, which changes codes after each optimizer "
                "step, and two steps have come without that: pass callbacks=[petl.Callback()] to a "
                "Trainer, or call petl.lifecycle(model).after_step(step, optimizer) in your loop"
            )
        if not self._warned and any(quantized.weight.dtype in HALF for quantized in trained):
            self._warned = True
            warnings.warn(
                "latent weights are in half precision, which loses small updates; keep them in "
                "float32",
                stacklevel=2,
            )
        # a weight that FSDP or ZeRO shards is gathered during its layer's forward only
        gathered = [w for w in trained if type(w.weight) is nn.Parameter and len(w.weight)]
        gathered.sort(key=QuantizedWeight.group_key)
        cache = {}
        for _, group in groupby(gathered, key=QuantizedWeight.group_key):
            alike = list(group)
            values = alike[0].values(alike).view(-1, *alike[0].weight.shape)
            for quantized, value in zip(alike, values.unbind(), strict=True):
                cache[id(quantized.weight)] = CachedValue.of(quantized.sources, value)
        return cache

    def read(self, quantized: "QuantizedWeight") -> Tensor:
        """The value of a weight, from the cache if it is valid."""
        sources, weight = quantized.sources, quantized.weight
        # these have no version
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return quantized.value()
        trains = torch.is_grad_enabled()
        if self.context.recording and not trains:
            self._reentrant = True  # first pass over a segment; the second must build a graph
        cached = self._cache[trains].get(id(weight))
        if cached is not None and cached.is_valid(sources) and not (trains and self._reentrant):
            return cached.value
        value = quantized.value()
        if not trains and type(weight) is nn.Parameter:  # not a DTensor or fake tensor
            self._cache[False][id(weight)] = CachedValue.of(sources, value)
        return value


@dataclass
class QuantizedWeight:
    """A quantized weight: the parameter `name` of the module `owner`.

    Attributes:
        packed: codes and statistics, if the weight was loaded from a packed file for inference;
            the parameter then holds the quantized values and is not quantized again.
        head: True for the weight of the adapter's copy of the classification head.
    """

    owner: nn.Module
    name: str
    bits: int
    adapter_name: str
    quantizer: Quantizer = field(repr=False)
    packed: Packed | None = None
    head: bool = False

    takes_steps: ClassVar[bool] = False  # True: its codes change after each optimizer step
    # what is lost if training goes on from codes
    lost: ClassVar[str] = (
        "no latent weights: training starts from weights spread evenly around the codes"
    )

    @property
    def weight(self) -> nn.Parameter:
        """The latent weight."""
        return cast(nn.Parameter, self.owner._parameters[self.name])

    @property
    def sources(self) -> Sequence[Tensor]:
        """The tensors from which `value` is computed."""
        return (self.weight,)

    def group_key(self) -> tuple[list[int], int, str, str, str]:
        """Shape, bits, device, dtype and kind: weights equal in these are quantized together."""
        weight = self.weight
        return (
            *(list(weight.shape), self.bits, str(weight.device), str(weight.dtype)),
            type(self).__name__,
        )

    def read(self) -> Tensor:
        """The quantized value, with which the adapter computes."""
        return self.weight if self.packed is not None else self.quantizer.read(self)

    def value(self) -> Tensor:
        """The quantized value, computed."""
        return quantize(self.weight, self.bits)

    def values(self, alike: Sequence[Self]) -> Tensor:
        """The quantized values of L weights with this one's `group_key`, [L, N]."""
        stacked = torch.stack([quantized.weight for quantized in alike])
        return quantize_each(stacked.flatten(1), self.bits)

    def unwrapped_key(self, key: str) -> str:
        """`key` without PEFT's wrapper of the head, if this is the head's weight."""
        return key.replace(f".modules_to_save.{self.adapter_name}.", ".") if self.head else key

    def start(self) -> None:
        """Complete a new weight, which has its initial values."""

    def beside(self, key: str) -> Sequence[str]:
        """Names in the model of the tensors besides the weight, whose name is `key`."""
        return ()

    def encode(self, weight: Tensor) -> Packed:
        """Codes and statistics for the file; `weight` is the gathered latent weight."""
        return encode(weight, self.bits) if self.packed is None else self.packed

    def loaded(
        self, latent: Tensor | None, packed: Packed | None, *, trains: bool
    ) -> Mapping[str, Tensor]:
        """Take what a file has of the weight, and return the model's tensors for it.

        Args:
            latent: the weight; None: the file has codes alone.
            packed: codes and statistics, or None.
            trains: False for an adapter that is loaded for inference.

        Returns:
            by suffix of the weight's name.
        """
        self.packed = None if trains else packed
        if packed is not None:
            return {
                "": (decode_latent if trains else decode)(*packed, self.weight.shape, self.bits)
            }
        assert latent is not None
        return {"": latent}

    def check(self, codes: Tensor, stats: Tensor) -> None:
        """Raise InputError unless codes and statistics of a file have this weight's shapes."""
        shape = self.weight.shape
        expected = packed_bytes(shape.numel(), self.bits)
        if codes.dtype != torch.uint8 or codes.shape != (expected,) or stats.shape != (2,):
            raise InputError(
                f"{codes.numel()} bytes of codes do not fit a weight {list(shape)} of {self.bits} "
                f"bits, which needs {expected}; the file was saved with another config"
            )


class QuantizedOwner(SwappedClass, nn.Module):
    """Mixin for the class of a module that owns quantized weights or computes with some."""

    keep_float32: ClassVar[bool] = True  # half precision loses the small updates of latent weights

    @classmethod
    def class_name(cls, original: type) -> str:
        """`QuantizedLinear` for Linear."""
        return f"Quantized{original.__name__}"

    @classmethod
    def extra_methods(cls, original: type) -> Arguments:
        """The computing methods of `original`, wrapped to read quantized weights."""
        return {name: _computing(name) for name in COMPUTING if hasattr(original, name)}

    def __getattr__(self, name: str) -> Any:
        quantized = self.__dict__.get("quantized_weights", {}).get(name)  # absent while copying
        if quantized is not None and self.__dict__["quantizer"].depth:
            return quantized.read()
        return super().__getattr__(name)


def _computing(name: str) -> Callable[..., object]:
    """Wrap the method `name` of the next class so that it reads quantized weights."""

    def method(self: Any, *args: object, **kwargs: object) -> object:
        quantizer = self.__dict__["quantizer"]
        quantizer.depth += 1  # methods may call one another
        try:
            return getattr(super(QuantizedOwner, self), name)(*args, **kwargs)
        finally:
            quantizer.depth -= 1

    method.__name__ = name
    return method


def swap_module(module: nn.Module, quantizer: Quantizer) -> None:
    """Make the computing methods of `module` read quantized weights."""
    module.__dict__["quantizer"] = quantizer
    module.__dict__.setdefault("quantized_weights", {})
    swap_class(module, QuantizedOwner)


def add_quantized_weight(quantized: QuantizedWeight) -> None:
    """Register a quantized weight with its owner, which then returns quantized values."""
    swap_module(quantized.owner, quantized.quantizer)
    quantized.owner.__dict__["quantized_weights"][quantized.name] = quantized
