"""How the parameters of an adapter are read as quantised weights while it computes.

The latent weights stay what they are: parameters of the inner method, under its names, for the
optimizer, for saving and for whatever the inner method does to them. The class of each module that
owns or uses some is replaced by a subclass, whose `__getattr__` gives the quantised value while a
computing method (`forward`, `delta`, ...) of the adapter runs, so that no method needs to know.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from petl.core.layers.class_swap import SwappedClass, swap_class
from petl.core.layers.context import ForwardContext, num_processes
from petl.core.layers.layer import HALF
from petl.errors import InputError, UnsupportedError
from petl.ops.quantize import decode, decode_latent, encode, packed_bytes, quantize, quantize_each

COMPUTING = (
    "forward", "with_base", "factors", "tensors", "delta", "get_delta_weight", "merge", "unmerge",
)  # fmt: skip


class Kept(NamedTuple):
    """A quantised value that still holds if its weight is this one, in this state."""

    weight: Tensor
    version: int
    address: int
    value: Tensor


class Reader:
    """What the quantised weights of a tuner share; a plain object, never saved.

    In a training forward all weights are quantised at its beginning, those of one shape together,
    for a layer would do it with fifty small kernels of its own and a shared pool once per layer.
    Reentrant checkpointing cannot share them (each segment has a backward pass to itself) and
    compiling need not, so there each read quantises.

    Attributes:
        depth: how many computing methods are running; weights are quantised if any is.
        spots: by adapter name, its quantised weights.
    """

    def __init__(self, context: ForwardContext) -> None:
        self.context = context
        self.depth = 0
        self.spots: dict[str, list[Spot]] = {}
        self._kept: dict[bool, dict[int, Kept]] = {False: {}, True: {}}  # by grad mode and weight
        self._reentrant = False
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what is kept, which has a graph."""
        return {**self.__dict__, "depth": 0, "_kept": {False: {}, True: {}}}

    def begin(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the base model."""
        if torch.compiler.is_compiling():
            return
        if self.context.recording or num_processes() > 1:  # FSDP fills weights without a trace
            self._kept[False].clear()
        if torch.is_grad_enabled():  # else a backward pass may still be to come
            self._reentrant = False
            self._kept[True] = self._quantize_all() if self.context.recording else {}

    def _quantize_all(self) -> dict[int, Kept]:
        spots = [s for spots in self.spots.values() for s in spots if s.weight.requires_grad]
        if any(spot.packed is not None for spot in spots):
            raise InputError(
                "the adapter was loaded from a packed file for inference and cannot train; load it "
                "with is_trainable=True, or better from a file saved with save_format='latent'"
            )
        if not self._warned and any(spot.weight.dtype in HALF for spot in spots):
            self._warned = True
            warnings.warn(
                "latent weights are in half precision, which loses small updates; keep them in "
                "float32",
                stacklevel=2,
            )
        # a weight that FSDP or ZeRO has cut up is whole in its layer's forward only
        whole = [spot for spot in spots if type(spot.weight) is nn.Parameter and len(spot.weight)]
        whole.sort(key=Spot.kind)
        kept = {}
        for (shape, bits, *_), same in groupby(whole, key=Spot.kind):
            weights: list[Tensor] = [spot.weight for spot in same]
            values = quantize_each(torch.stack(weights).flatten(1), bits).view(-1, *shape)
            for weight, value in zip(weights, values.unbind(), strict=True):
                kept[id(weight)] = Kept(weight, weight._version, weight.data_ptr(), value)
        return kept

    def read(self, weight: Tensor, bits: int) -> Tensor:
        """The quantised value of `weight`."""
        if torch.compiler.is_compiling() or weight.is_inference():
            return quantize(weight, bits)
        trains = torch.is_grad_enabled()
        if self.context.recording and not trains:
            self._reentrant = True  # the first pass over a segment; the second has a graph to make
        found = self._kept[trains].get(id(weight))
        if (
            found is not None
            and found.weight is weight
            and found.version == weight._version
            and found.address == weight.data_ptr()
            and not (trains and self._reentrant)
        ):
            return found.value
        value = quantize(weight, bits)
        if not trains and type(weight) is nn.Parameter:  # one with values, and whole
            kept = Kept(weight, weight._version, weight.data_ptr(), value)
            self._kept[False][id(weight)] = kept
        return value


@dataclass
class Spot:
    """A quantised weight: the parameter `name` of the module `owner`.

    Attributes:
        packed: codes and stats of a weight that was loaded from a packed file; it holds the
            quantised values, final, which must not be quantised again.
        head: it is the weight of the copy of the head that PEFT keeps for the adapter.
    """

    owner: nn.Module
    name: str
    bits: int
    adapter_name: str
    reader: Reader = field(repr=False)
    packed: tuple[Tensor, Tensor] | None = None
    head: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The latent weight."""
        return cast(nn.Parameter, self.owner._parameters[self.name])

    def kind(self) -> tuple[list[int], int, str, str]:
        """Weights of one kind can be quantised together."""
        weight = self.weight
        return list(weight.shape), self.bits, str(weight.device), str(weight.dtype)

    def read(self) -> Tensor:
        """What an adapter computes with."""
        weight = self.weight
        return weight if self.packed is not None else self.reader.read(weight, self.bits)

    def outside(self, key: str) -> str:
        """The name of the weight outside PEFT's wrapper of the head; `key` itself for others."""
        return key.replace(f".modules_to_save.{self.adapter_name}.", ".") if self.head else key

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and stats for the file, of `weight`, which is the latent weight made whole."""
        return encode(weight, self.bits) if self.packed is None else self.packed

    def take(self, codes: Tensor, stats: Tensor, *, trains: bool) -> Tensor:
        """The weight that a packed file stands for; final, unless it is to train.

        Raises:
            InputError: the file is about other weights.
        """
        shape = self.weight.shape
        expected = packed_bytes(shape.numel(), self.bits)
        if codes.dtype != torch.uint8 or codes.shape != (expected,) or stats.shape != (2,):
            raise InputError(
                f"{codes.numel()} bytes of codes do not fit a weight {list(shape)} at {self.bits} "
                f"bits, which has {expected}; the file is of another config"
            )
        self.packed = None if trains else (codes, stats)
        return (decode_latent if trains else decode)(codes, stats, shape, self.bits)


class Quantized(SwappedClass, nn.Module):
    """Mixed into the class of a module that owns quantised weights or computes with some."""

    keep_float32: ClassVar[bool] = True  # half precision loses the small updates of latent weights

    @classmethod
    def class_name(cls, original: type) -> str:
        """`QuantisedLinear` for Linear."""
        return f"Quantised{original.__name__}"

    @classmethod
    def extra_methods(cls, original: type) -> dict[str, Any]:
        """The computing methods of `original`, which read quantised weights."""
        return {name: _computing(name) for name in COMPUTING if hasattr(original, name)}

    def __getattr__(self, name: str) -> Any:
        spot = self.__dict__.get("spots", {}).get(name)  # none yet while a copy is made
        if spot is not None and self.__dict__["reader"].depth:
            return spot.read()
        return super().__getattr__(name)


def _computing(name: str) -> Callable[..., Any]:
    """The method `name` of the next class, which reads quantised weights."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_is_replica" in self.__dict__:  # its weights are no parameters
            raise UnsupportedError(
                "nn.DataParallel would compute with the latent weights; start one process for each "
                "GPU instead, with torchrun or accelerate launch"
            )
        reader = self.__dict__["reader"]
        reader.depth += 1
        try:
            return getattr(super(Quantized, self), name)(*args, **kwargs)
        finally:
            reader.depth -= 1

    method.__name__ = name
    return method


def convert(module: nn.Module, reader: Reader) -> None:
    """Make `module` read quantised weights when it computes."""
    module.__dict__["reader"] = reader
    module.__dict__.setdefault("spots", {})
    swap_class(module, Quantized)


def add_spot(spot: Spot) -> None:
    """Make the owner of a weight give its quantised value to what computes."""
    convert(spot.owner, spot.reader)
    spot.owner.__dict__["spots"][spot.name] = spot
