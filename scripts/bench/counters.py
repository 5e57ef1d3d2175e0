"""Count FLOPs, kernel launches, host-device syncs and saved bytes of a step, reproducibly."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from petl.core.parameters import LiveBytes

aten = torch.ops.aten
Step = Callable[[], Any]


@dataclass(frozen=True)
class Counts:
    """Counts of one step.

    Attributes:
        flops: of matrix products, two for each multiply-add; without attention.
        kept: bytes that forward saves for backward, each storage once, without weights.
        kernels: launches of operators that compute; views and allocations do not count.
        waits: host-device syncs: reads of a value from the device.
        peak: peak bytes of the tensors that the step allocates, including gradients.
    """

    flops: int
    kept: int
    kernels: int
    waits: int
    peak: int


def count(step: Step, model: nn.Module, inputs: Iterable[Tensor] = ()) -> Counts:
    """Run `step`, a forward and backward pass of `model` over `inputs`, and return its counts."""
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
    """Return the FLOPs of the matrix products in `step`.

    Torch's own counter ignores in-place and sparse products, and its hooks on all modules disable
    petl's fused layers. Attention is not counted: the CPU kernel has no formula, and no adapter
    changes it. Neither are the angles of rotary embeddings of `model`.
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
    """Sums up the FLOPs of the products in its block (`total`)."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.paused = 0

    def pause(self, change: int) -> None:
        """Add `change` to the number of reasons not to count; products count while it is 0."""
        self.paused += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None and not self.paused:
            self.total += formula(*args)
        return func(*args, **(kwargs or {}))


def product(left: Tensor, right: Tensor) -> int:
    """Return the FLOPs of `left @ right`; of a sparse matrix, only entries count."""
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
    """Return the bytes of the storages that autograd saves in `step`, without those of `own`.

    A saved view keeps its complete storage alive, so the storage counts. What is computed again in
    the backward pass does not count: it was not kept.
    """
    known = {tensor.untyped_storage()._cdata for tensor in own if tensor.layout == torch.strided}
    held: dict[int, Tensor] = {}  # keeps them alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        is_backward = torch._C._current_graph_task_id() >= 0
        for part in () if is_backward else _parts(tensor):
            key = part.untyped_storage()._cdata
            if key not in known:
                held.setdefault(key, part)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that hold the data of a tensor, which may be sparse."""
    if tensor.layout == torch.strided:
        return (tensor.detach(),)
    if tensor.layout == torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    return (tensor.crow_indices(), tensor.col_indices(), tensor.values())


# Kernels


class Kernels(TorchDispatchMode):
    """Counts launches of computing operators, and host-device syncs, in its block."""

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
    """Counts the collective operations in its block."""

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
