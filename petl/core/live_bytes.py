"""Count the bytes of tensors while they are alive, and stop before there are too many."""

import math
import weakref
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petl.errors import InputError


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
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
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


class LimitExceeded(MemoryError):
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
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        more = requested_bytes(func, args, kwargs or {})
        if not more:
            return func(*args, **(kwargs or {}))
        if self.now + more > self.limit:
            raise LimitExceeded(self.now + more)
        return super().__torch_dispatch__(func, types, args, kwargs)


def requested_bytes(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Return the bytes of the tensor that an operation such as `torch.empty` makes, else 0."""
    names = [argument.name for argument in func._schema.arguments]
    is_method = func._schema.name.startswith("aten::new_")  # of a tensor, which comes first
    if "size" not in names[: 1 + is_method]:
        return 0
    size = args[names.index("size")]
    dtype = kwargs.get("dtype") or (args[0].dtype if is_method else torch.get_default_dtype())
    return math.prod(size) * dtype.itemsize


@contextmanager
def within_memory(what: str, remedy: str) -> Generator[None]:
    """Inside the block, refuse tensors that exceed the memory of this machine.

    Raises:
        InputError: `what` has more bytes than the machine; those that do not fit are not allocated.
    """
    total = psutil.virtual_memory().total
    try:
        with LimitedBytes(total):
            yield
    except LimitExceeded as error:
        raise InputError(
            f"{what} needs at least {error.args[0] / 1e9:,.0f} GB, more than the "
            f"{total / 1e9:,.0f} GB of memory of this machine: {remedy}"
        ) from error
