"""What a step calls and keeps, counted: figures that repeat exactly, on any machine."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from petl.core.dry_run import LiveBytes

aten = torch.ops.aten
Step = Callable[[], Any]


@dataclass(frozen=True)
class Counts:
    """Of one step.

    Attributes:
        flops: of products, two for each multiplication and addition; attention is left out.
        kept: bytes that forward keeps for backward, each storage once, weights left out.
        kernels: calls of operators that compute; views and allocations are left out.
        waits: calls that wait for a value from the device.
        peak: the most bytes alive at once of tensors that the step makes, gradients included.
    """

    flops: int
    kept: int
    kernels: int
    waits: int
    peak: int


def count(step: Step, model: nn.Module, inputs: Iterable[Tensor] = ()) -> Counts:
    """Run `step`, a forward and backward pass of `model` over `inputs`, and count."""
    kernels = Kernels()
    with kernels:
        step()
    own = [*model.parameters(), *model.buffers(), *inputs]
    with LiveBytes(own) as live:
        step()
    return Counts(
        flops(step, model), kept_bytes(step, own), kernels.count, kernels.waits, live.peak
    )


# Products


def flops(step: Step, model: nn.Module | None = None) -> int:
    """FLOPs of the products in `step`.

    Torch's own counter passes over what is done in place or with a sparse matrix, and hooks itself
    onto all modules, before which layers that compute for others step back. Attention is left out,
    for the CPU's kernel has no count and no adapter changes it, and so are the angles of rotary
    embeddings of `model`.
    """
    counter = Products()
    modules = () if model is None else model.named_modules()
    angles = [module for name, module in modules if name.endswith("rotary_emb")]
    handles = [m.register_forward_pre_hook(lambda *_: counter.pause(1)) for m in angles]
    handles += [m.register_forward_hook(lambda *_: counter.pause(-1)) for m in angles]
    try:
        with counter:
            step()
    finally:
        for handle in handles:
            handle.remove()
    return counter.total


class Products(TorchDispatchMode):
    """Adds up the FLOPs of the products in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.paused = 0

    def pause(self, change: int) -> None:
        """Count nothing for as long as the sum of the changes is above 0."""
        self.paused += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None and not self.paused:
            self.total += formula(*args)
        return func(*args, **(kwargs or {}))


def product(left: Tensor, right: Tensor) -> int:
    """FLOPs of `left @ right`; a sparse matrix counts by its entries."""
    if left.layout != torch.strided:
        return 2 * left._nnz() * right.shape[-1]
    if right.layout != torch.strided:
        return 2 * right._nnz() * left.shape[-2]
    batch = left.shape[0] if left.dim() == 3 else 1
    return 2 * batch * left.shape[-2] * left.shape[-1] * (right.shape[-1] if right.dim() > 1 else 1)


def _added_to(first: Any, left: Tensor, right: Tensor, *rest: Any) -> int:
    return product(left, right)


FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv), product),
    **dict.fromkeys((aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_), _added_to),
    **dict.fromkeys((aten.addmv, aten.addmv_), _added_to),
    **dict.fromkeys((aten.dot, aten.vdot), lambda left, right: 2 * left.numel()),
    **dict.fromkeys(
        (aten.addr, aten.addr_), lambda first, left, right: 2 * left.numel() * right.numel()
    ),
    aten.sparse_sampled_addmm: lambda pattern, left, right: 2 * pattern._nnz() * left.shape[-1],
}


# Bytes


def kept_bytes(step: Step, own: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd saves in `step`, those of `own` tensors left out.

    A saved view keeps its whole storage alive, so that is what counts.
    """
    known = {tensor.untyped_storage()._cdata for tensor in own if tensor.layout == torch.strided}
    held: dict[int, Tensor] = {}  # holding them keeps addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            key = part.untyped_storage()._cdata
            if key not in known:
                held.setdefault(key, part)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold the data of one, which may be sparse."""
    if tensor.layout == torch.strided:
        return (tensor.detach(),)
    if tensor.layout == torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    return (tensor.crow_indices(), tensor.col_indices(), tensor.values())


# Kernels


class Kernels(TorchDispatchMode):
    """Counts the operators that are called in its block and compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.waits += 1
        elif not (func.is_view or name in FREE or name.startswith(("empty", "new_empty"))):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Collectives(TorchDispatchMode):
    """Counts the operations between processes in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


FREE = (
    "_unsafe_view",
    "lift_fresh",
    "alias",
    "resize_",
    "set_",
    "_reshape_alias",
    "promote_types",  # of dtypes
)
