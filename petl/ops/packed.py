"""Second copies of linear weights: in the dtype of autocast, or in oneDNN's blocked layout.

The latter are for passes of a few rows on a CPU.
For 2 to 16 rows, torch's float32 `linear` is far slower than its arithmetic on x86 CPUs; oneDNN is
not, if the weight is in its own layout. The copy is used for more than one row and only inside
`PackedWeights.active`, without gradients. Both functions of torch are private: `is_supported` tries
them. Shapes: I in, O out.
"""

import math
import platform
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 8  # of the passes for which oneDNN chooses the layout
CAST = "_cast"  # attribute of a layer with a cast copy
in_use: list[int] = []  # an entry for each `PackedWeights.active` that runs, in any thread
_local = threading.local()  # weights: copies by id of the weight, inside `PackedWeights.active`


class PackedLinear(nn.Linear):
    """nn.Linear whose weight may have a packed copy; it replaces the class of a live nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Cast(NamedTuple):
    state: tuple[int, int]
    weight: Tensor


class CastLinear(nn.Linear):
    """nn.Linear with a cast copy of its frozen weight; it replaces the class of a live nn.Linear.

    The layer itself computes as ever: kernels that are fused with it ask for the copy. What has
    changed a weight through `.data`, as merging does, leaves no trace in it, so that the copy is
    made anew after a change between training and evaluation, too.
    """

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [O, I] in a dtype: itself, or a copy that is kept if it is frozen."""
        weight = self.weight
        if weight.dtype == dtype or weight.requires_grad:
            return weight
        # the storage is another one after an assignment to `.data`
        state = (weight._version, weight.untyped_storage()._cdata)
        known = vars(self).get(CAST)
        if known is None or known.state != state or known.weight.dtype != dtype:
            known = _Cast(state, weight.detach().to(dtype))
            vars(self)[CAST] = known
        return known.weight

    def train(self, mode: bool = True) -> "CastLinear":
        """Set the mode; the copy is forgotten if it changes."""
        if mode != self.training:
            vars(self).pop(CAST, None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, object]:
        # of copies and files
        return {name: value for name, value in vars(self).items() if name != CAST}


class HeldLinear(CastLinear):
    """nn.Linear that computes with its cast copy under autocast on a CPU, without gradients."""

    def forward(self, input: Tensor) -> Tensor:
        is_cast = torch.is_autocast_enabled("cpu") and input.dtype != torch.float64
        if torch.is_grad_enabled() or not is_cast or torch.compiler.is_compiling():
            return super().forward(input)
        return F.linear(input, self.weight_in(torch.get_autocast_dtype("cpu")), self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b`, [..., O], for x [..., I] and W [O, I], by an active packed copy."""
    # a compiled graph would keep the choice that was right when it was traced
    copies = None if torch.compiler.is_compiling() else getattr(_local, "weights", None)
    if copies is not None and x.numel() > x.shape[-1] and x.dtype == torch.float32:
        is_plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        copy = copies.get(id(weight)) if is_plain else None
        if copy is not None:
            return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")
    return F.linear(x, weight, bias)


@cache
def is_supported() -> bool:
    """Return True if this CPU and this torch have packed products; a small one is tried."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not (is_x86 and torch.backends.mkldnn.is_available()):
        return False
    x, weight = torch.arange(32.0).view(2, 16), torch.arange(128.0).view(8, 16) / 64
    try:
        y = torch.ops.mkldnn._linear_pointwise(x, _reordered(weight), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):  # other names, or another signature
        return False
    return torch.allclose(y, x @ weight.t())


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


class _Copy(NamedTuple):
    weight: "ref[Tensor]"
    state: tuple[int, ...]
    packed: Tensor


def _state(weight: Tensor) -> tuple[int, ...]:
    """Return what changes with the values of a weight: address, version, a sum of its bits."""
    # a change through `.data`, as in merging, leaves address and version as they are
    # a sum wraps and misses permutations; it reads the weights once, and a hash takes longer
    bits = weight.detach().view(-1)
    # two values at a time, where memory is aligned for it
    is_even = len(bits) % 2 == 0 and bits.storage_offset() % 2 == 0
    total = bits.view(torch.int64 if is_even else torch.int32).sum()
    return weight.data_ptr(), weight._version, int(total)


class PackedWeights:
    """The packed copies of a model's linear weights.

    Attributes:
        copies: by id of the weight.
        seconds: that packing them took.
        lost: seconds that passes without copies took beyond those with them, as decoding counts.
    """

    def __init__(self) -> None:
        self.copies: dict[int, _Copy] = {}
        self.seconds = self.lost = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        # a blocked tensor does not tell its storage; blocks of whole rows have no more entries
        return sum(4 * copy.packed.numel() for copy in self.copies.values())

    @torch.no_grad()
    def update(
        self,
        model: nn.Module,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Pack the weights of `model` that have no copy or have changed since; forget others.

        Args:
            model: its layers of `packable`.
            seconds: leave out what would take longer, by the time that packing has taken so far.
            clock: seconds now.
        """
        layers = packable(model)
        self.copies = {
            id(each.weight): self.copies[id(each.weight)]
            for each in layers
            if self.has(each.weight)
        }
        self.pack(layers, seconds, clock)

    def has(self, weight: Tensor) -> bool:
        """Return True if there is a copy of a weight, and it has not changed since."""
        known = self.copies.get(id(weight))
        return known is not None and known.weight() is weight and known.state == _state(weight)

    @torch.no_grad()
    def pack(self, layers: Iterable[nn.Linear], seconds: float, clock: Callable[[], float]) -> None:
        """Pack weights without a copy, one after the other, until it would take too long.

        Args:
            layers: of `packable`; what `update` has not seen changes unnoticed.
            seconds: of packing.
            clock: seconds now.
        """
        for layer in layers:
            weight = layer.weight
            if id(weight) in self.copies:
                continue
            # of the first one nothing is known
            price = self.seconds * weight.nbytes / self.nbytes if self.copies else 0.0
            if price >= seconds:
                return
            began = clock()
            self.copies[id(weight)] = _Copy(ref(weight), _state(weight), _reordered(weight))
            taken = clock() - began
            self.seconds, seconds = self.seconds + taken, seconds - taken

    @contextmanager
    def active(self) -> Generator[None]:
        """Use the copies inside the block, in this thread."""
        _local.weights = {key: copy.packed for key, copy in self.copies.items()}
        in_use.append(len(self.copies))
        try:
            yield
        finally:
            in_use.pop()
            _local.weights = None


_known: "WeakKeyDictionary[nn.Module, PackedWeights]" = WeakKeyDictionary()


def packed_weights(model: nn.Module) -> PackedWeights:
    """Return the copies of a model, which are kept as long as the model."""
    return _known.setdefault(model, PackedWeights())


def packable(model: nn.Module) -> list[nn.Linear]:
    """Return the layers whose weights can be packed: float32 nn.Linear on the CPU."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [
        layer
        for layer in layers
        if type(layer) in (nn.Linear, PackedLinear)
        and type(layer.weight) in (nn.Parameter, Tensor)
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and layer.weight.is_contiguous()
        and not layer.weight.is_inference()  # such tensors have no version
    ]


@contextmanager
def packed_classes(model: nn.Module) -> Generator[None]:
    """Let the layers of `packable` look for packed copies inside the block.

    Their class changes; module, weight, hooks and state dict stay what they are.
    """
    changed = [layer for layer in packable(model) if type(layer) is nn.Linear]
    for layer in changed:
        layer.__class__ = PackedLinear
    try:
        yield
    finally:
        for layer in changed:
            layer.__class__ = nn.Linear
