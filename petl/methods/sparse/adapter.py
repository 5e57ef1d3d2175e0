"""The tuned entries of a layer, the watch over those that may replace them, and the exchange."""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.distributed import to_full, to_shards
from petl.core.layers.context import num_processes
from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.errors import UnsupportedError
from petl.methods.sparse.compiled import compiled_linear, enlist
from petl.methods.sparse.schedule import observes
from petl.ops.low_rank import is_frozen_linear, product_dtype
from petl.ops.positions import random_positions, regrow
from petl.ops.sparse import Support, add_sparse, largest_products, products_at, sparse_linear


@dataclass
class Watch:
    """Gradients of the weight at candidate positions [K], over the updates of a phase.

    Attributes:
        candidates: positions, ascending.
        total: sum over updates; `square` of their squares.
        update: sum of the gradients of this update's micro-batches so far.
        own: the same of the tuned entries, as backward passes gave it.
        updates: how many are in `total`.
    """

    candidates: Tensor
    total: Tensor
    square: Tensor
    update: Tensor
    own: Tensor
    updates: int = 0

    FIELDS: ClassVar = ("candidates", "total", "square", "updates")  # of `state`

    @classmethod
    def of(cls, candidates: Tensor) -> "Watch":
        zeros = candidates.new_zeros(4, len(candidates), dtype=torch.float32)
        total, square, update, own = zeros
        return cls(candidates, total, square, update, own)

    def end_update(self, gradient: Tensor) -> None:
        """Take in the gradient of a whole update at the candidates, [K]."""
        self.total += gradient
        self.square.addcmul_(gradient, gradient)
        self.update.zero_()
        self.own.zero_()
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, between two updates."""
        return {field: torch.as_tensor(getattr(self, field)) for field in self.FIELDS}

    @classmethod
    def read(cls, state: dict[str, Tensor], device: torch.device) -> "Watch":
        """What `state` gave, on another device."""
        watch = cls.of(state["candidates"].to(device))
        watch.total.copy_(state["total"])
        watch.square.copy_(state["square"])
        watch.updates = int(state["updates"])
        return watch


class SparseAdapter(Adapter):
    """`values` [K], added to the base weight at the flat positions `indices` [K] of its storage.

    Attributes:
        step: completed optimizer steps, as of the last one at which something was due.
        watch: the gradients seen in this phase; None outside, and before its first backward pass.
    """

    keep_float32 = True

    def __init__(self, shape: LayerShape, config: Any, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        count, device, self.transposed = (
            info.settings[k] for k in ("count", "device", "transposed")
        )
        self.stored_shape = shape if self.transposed else (shape.out_features, shape.in_features)
        self.values = nn.Parameter(torch.zeros(count, device=device))
        self.indices: Tensor
        self.register_buffer("indices", self._random_indices(count, config.init_seed, device))
        self.config = config
        self.step = 0
        self.watch: Watch | None = None
        self.kept: Tensor | None = None  # original values of a merged base weight
        self.number = enlist(self)

    def _random_indices(self, count: int, seed: int, device: torch.device) -> Tensor:
        size = self.shape.in_features * self.shape.out_features
        dtype = torch.int32 if size < 2**31 else torch.int64
        if device.type == "meta":  # a plan, not a run
            return torch.empty(count, dtype=dtype, device=device)
        digest = hashlib.sha256(f"{seed} {self.info.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return random_positions(count, size, generator).to(dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = enlist(self)

    # Products

    @property
    def support(self) -> Support:
        return Support(self.indices, self.transposed)

    def with_base(self, x: Tensor, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not is_frozen_linear(base):
            return super().with_base(x, base, *args, **kwargs)
        x = x.to(product_dtype(x))
        weight, bias = base.get_parameter("weight"), cast(Tensor | None, base.bias)
        if torch.compiler.is_compiling():
            return compiled_linear(x, self.values, weight, bias, self.number)
        return sparse_linear(x, weight, bias, self.values, self.support, self.products)

    @torch.compiler.disable
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_sparse(y, x.to(y.dtype), self.values, self.support, self.products)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """`left^T right`, the gradient of the stored weight, at the positions: [K].

        In a phase of observation, that at the candidates is added up on the side.
        """
        own = products_at(left, right, self.indices)
        if self.training and len(self.indices) and observes(self.config, self.step + 1):
            if self.watch is None:
                self.watch = Watch.of(self._candidates(left, right))
            self.watch.update += products_at(left, right, self.watch.candidates)
            self.watch.own += own
        return own

    def _candidates(self, left: Tensor, right: Tensor) -> Tensor:
        """The positions with the largest gradients, as many as there are; of process 0 for all."""
        processes = num_processes()
        if processes == 1 or torch.distributed.get_rank() == 0:
            found = largest_products(left, right, len(self.indices), self.indices.dtype)
        else:
            found = torch.empty_like(self.indices)
        if processes > 1:
            torch.distributed.broadcast(found, src=0)
        return found

    # Merging

    def delta(self) -> Tensor:
        delta = self.values.new_zeros(self.shape.in_features * self.shape.out_features)
        delta = delta.index_copy(0, self.indices.long(), self.values).view(self.stored_shape)
        return delta.t() if self.transposed else delta

    def merge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        merged, at = weight.clone(memory_format=torch.contiguous_format), self.indices.long()
        self.kept = merged.view(-1)[at]
        merged.view(-1)[at] = (self.kept + self.values).to(weight.dtype)
        return merged

    def unmerge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        assert self.kept is not None
        plain = weight.clone(memory_format=torch.contiguous_format)
        plain.view(-1)[self.indices.long()] = self.kept.to(weight)
        self.kept = None
        return plain

    # The exchange

    @torch.no_grad()
    def exchange(
        self, candidates: Tensor, scores: Tensor, count: int, optimizer: Optimizer | None
    ) -> None:
        """Replace up to `count` entries of small value by candidates [C] of large score [C].

        New entries start at 0. What `optimizer` holds for an entry moves with it; for a new one it
        starts from what `watch` saw, if anything. None: it holds nothing for single entries.
        """
        values = to_full(self.values)
        index, order, source = regrow(self.indices, values, candidates, scores, count)
        is_new = source >= 0
        if optimizer is not None:
            for state, start in per_entry_state(optimizer, self.values, self.watch, source):
                state.copy_(to_shards(torch.where(is_new, start, to_full(state)[order]), state))
        self.values.copy_(to_shards(torch.where(is_new, 0.0, values[order]), self.values))
        self.indices.copy_(index)

    def begin(self, step: int) -> None:
        """Get ready to train after `step` updates; what a resumed phase has watched is kept."""
        self.step = step
        if step == 0:
            self.watch = None

    def end_step(self, step: int) -> None:
        """Note that update `step` is done; what was watched lives on only within a phase."""
        self.step = step
        if not (observes(self.config, step) and observes(self.config, step + 1)):
            self.watch = None


def per_entry_state(
    optimizer: Optimizer, values: nn.Parameter, watch: Watch | None, source: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the optimizer with an entry for each value, and what new entries start at.

    `source` [K] is the candidate that each entry grew from.

    Raises:
        UnsupportedError: a tensor of bytes, which 8-bit optimizers scale by blocks.
    """
    state: dict[str, Any] = optimizer.state.get(values, {})
    found = {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == values.shape}
    for key, tensor in found.items():
        if tensor.dtype in (torch.uint8, torch.int8):
            raise UnsupportedError(
                f"the optimizer's {key} is {tensor.dtype}: entries scaled by blocks cannot move "
                "with the indices of method 'sparse'; use an optimizer with a 32-bit state"
            )
    group = next(g for g in optimizer.param_groups if any(p is values for p in g["params"]))
    starts = {} if watch is None else _watched_moments(watch, source.clamp(min=0), group, state)
    none = torch.zeros_like(source, dtype=torch.float32)
    return [(t, starts.get(key, none).to(t.dtype)) for key, t in found.items()]


def _watched_moments(
    watch: Watch, seen: Tensor, group: dict[str, Any], state: dict[str, Any]
) -> dict[str, Tensor]:
    """Adam's moments that, corrected for bias, are the means of the watched gradients and squares.

    The authors' own AdamW counts the updates of each entry in `age`, the coming one included.
    """
    first, second = watch.total[seen] / watch.updates, watch.square[seen] / watch.updates
    ages = torch.full_like(first, watch.updates + 1)
    steps = watch.updates if "age" in state else state.get("step")
    if "betas" in group and steps is not None:
        first *= 1 - group["betas"][0] ** steps
        second *= 1 - group["betas"][1] ** steps
    return {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second, "age": ages}
