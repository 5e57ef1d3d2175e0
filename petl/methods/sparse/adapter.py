"""The tuned entries of a layer, gradients of candidates to replace them, and the exchange.

Shapes: K tuned entries and as many candidates, T tokens, weights stored as [P, Q].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.types import Record
from petl.errors import UnsupportedError
from petl.methods.families.masks import register_adapter
from petl.methods.sparse.compiled import compiled_linear
from petl.methods.sparse.config import SparseConfig
from petl.methods.sparse.schedule import accumulates
from petl.ops.low_rank import cast_for_product, is_frozen_linear
from petl.ops.positions import generator_of, random_positions, regrow
from petl.ops.sparse import (
    Support,
    add_product,
    add_sparse,
    largest_entries,
    largest_products,
    products_at,
    sparse_linear,
)
from petl.system.collectives import num_processes, summed, to_full, to_shards
from petl.system.files.tensor_file import check_index


@dataclass
class Candidates:
    """Candidate positions [K] and gradients of the weight there, before a selection.

    Attributes:
        candidates: positions, ascending.
        total: sum of the gradients over updates.
        square: sum of their squares.
        update: gradient of the current update, summed over micro-batches so far.
        own: the same at the tuned entries, before averaging over processes and clipping.
        updates: number of updates in `total`.
    """

    candidates: Tensor
    total: Tensor
    square: Tensor
    update: Tensor
    own: Tensor
    updates: int = 0

    FIELDS: ClassVar = ("candidates", "total", "square", "updates")  # saved in checkpoints

    @classmethod
    def at(cls, candidates: Tensor) -> "Candidates":
        """Candidates at these positions, with sums of zero."""
        zeros = candidates.new_zeros(4, len(candidates), dtype=torch.float32)
        total, square, update, own = zeros
        return cls(candidates, total, square, update, own)

    def end_update(self, gradient: Tensor) -> None:
        """Add the gradient of a complete update at the candidates, [K]."""
        self.total += gradient
        self.square.addcmul_(gradient, gradient)
        self.update.zero_()
        self.own.zero_()
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """The state that a resumed run needs, between two updates."""
        return {field: torch.as_tensor(getattr(self, field)) for field in self.FIELDS}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], device: torch.device) -> "Candidates":
        """Restore the result of `state`, on this device."""
        restored = cls.at(state["candidates"].to(device))
        restored.total.copy_(state["total"])
        restored.square.copy_(state["square"])
        restored.updates = int(state["updates"])
        return restored


@dataclass
class FirstUpdate:
    """Gradient of the update from which candidates are chosen, summed over micro-batches so far.

    Attributes:
        whole: of the complete weight, [P, Q].
        own: at the tuned entries, [K].
    """

    whole: Tensor
    own: Tensor

    def candidates(self, count: int, dtype: torch.dtype) -> Candidates:
        """The `count` positions with the largest gradients, and the gradients there."""
        found = Candidates.at(largest_entries(self.whole, count, dtype))
        found.update.copy_(self.whole.view(-1)[found.candidates.long()])
        found.own.copy_(self.own)
        return found


class SparseAdapter(Adapter):
    """`values` [K], added to the base weight at the flat positions `indices` [K] of its storage.

    Attributes:
        step: completed optimizer steps, as of the last one with accumulation or selection.
        candidates: candidates for the next selection; None while gradients are not accumulated,
            and until they are chosen.
        first: what they will be chosen from, while the first update of an accumulation is computed.
        calls: training forwards of this layer in the current update, while accumulating.
        starts_at_zero: False if the training began with the values of an earlier one.
    """

    keep_float32 = True  # half precision would lose small updates of the values

    def __init__(self, shape: LayerShape, config: SparseConfig, info: LayerInfo) -> None:
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
        self.candidates: Candidates | None = None
        self.first: FirstUpdate | None = None
        self.calls = 0
        self.starts_at_zero = True
        self.unmerged: Tensor | None = None  # original entries of a merged base weight
        self.number = register_adapter(self)

    def _random_indices(self, count: int, seed: int, device: torch.device) -> Tensor:
        size = self.shape.in_features * self.shape.out_features
        # int32 halves the size of the indices
        dtype = torch.int32 if size < 2**31 else torch.int64
        if device.type == "meta":  # a dry run
            return torch.empty(count, dtype=dtype, device=device)
        return random_positions(count, size, generator_of(seed, self.info.key)).to(dtype)

    def check_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise InputError unless the positions are entries of the weight, each at most once."""
        size = self.shape.in_features * self.shape.out_features
        check_index(f"{self.info.key}: indices", tensors["indices"], size, unique=True)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.values.is_meta:
            self.starts_at_zero = self._is_zero()

    def __setstate__(self, state: Record) -> None:
        super().__setstate__(state)
        self.number = register_adapter(self)  # a copy needs a number of its own

    # Products

    @property
    def support(self) -> Support:
        """The tuned positions, as the products take them."""
        return Support(self.indices, self.transposed)

    def with_base(self, x: Tensor, base: nn.Module, *args: object, **kwargs: object) -> Tensor:
        if args or kwargs or not is_frozen_linear(base):
            return super().with_base(x, base, *args, **kwargs)
        self._count_call()
        x = cast_for_product(x)
        weight, bias = cast(Tensor, base.weight), cast(Tensor | None, base.bias)
        if torch.compiler.is_compiling():
            return compiled_linear(x, self.values, weight, bias, self.number)
        return sparse_linear(x, weight, bias, self.values, self.support, self.products)

    @torch.compiler.disable
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self._count_call()
        return add_sparse(y, x.to(y.dtype), self.values, self.support, self.products)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """`left^T right`, the gradient of the stored weight, at the tuned positions: [K].

        While gradients are accumulated, also adds the gradient at the candidates to `candidates`,
        or, before there are any, that of the complete weight to `first`.
        """
        own = products_at(left, right, self.indices)
        if not self._accumulates():
            return own
        # the only backward pass of this layer, as far as is known
        is_whole = self.info.context.micro_batches == 1 and self.calls == 1
        if self.candidates is None and is_whole:
            K, dtype = len(self.indices), self.indices.dtype
            self.candidates = Candidates.at(largest_products(left, right, K, dtype, summed))
        if self.candidates is not None:
            self.candidates.update += products_at(left, right, self.candidates.candidates)
            self.candidates.own += own
        else:
            if self.first is None:
                self.first = self._no_gradient(own.dtype)
            add_product(self.first.whole, left, right)
            self.first.own += own
        return own

    def _accumulates(self) -> bool:
        accumulating = accumulates(self.config, self.step + 1)
        return self.training and accumulating and len(self.indices) > 0

    def _count_call(self) -> None:
        # not when recomputed by checkpointing; a compiled call cannot count, which is no fault
        if not torch.compiler.is_compiling() and self.info.context.recording:
            self.calls += self._accumulates()

    def _no_gradient(self, dtype: torch.dtype) -> FirstUpdate:
        device = self.values.device
        whole = torch.zeros(self.stored_shape, dtype=dtype, device=device)
        return FirstUpdate(whole, torch.zeros(len(self.indices), dtype=dtype, device=device))

    def choose_candidates(self) -> None:
        """Choose the candidates from the first update's gradient, averaged over processes."""
        first, self.first = self.first, None
        processes = num_processes()
        if self.candidates is not None or (first is None and processes == 1):
            return
        # all processes take part, also one whose rows did not reach this layer
        first = self._no_gradient(torch.float32) if first is None else first
        summed(first.whole).div_(processes)
        if processes == 1 or first.whole.any():
            self.candidates = first.candidates(len(self.indices), self.indices.dtype)

    def tuned_by_input(self) -> Tensor:
        """The number of tuned weights of each input, [I]."""
        Q, at = self.stored_shape[1], self.indices.long()
        inputs = at // Q if self.transposed else at % Q
        return torch.bincount(inputs, minlength=self.shape.in_features)

    # Merging

    def delta(self) -> Tensor:
        """The dense update, [O, I]."""
        delta = self.values.new_zeros(self.shape.in_features * self.shape.out_features)
        delta = delta.index_copy(0, self.indices.long(), self.values).view(self.stored_shape)
        return delta.t() if self.transposed else delta

    def merge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """The weight plus the values, which changes at the tuned positions only."""
        merged, at = weight.clone(memory_format=torch.contiguous_format), self.indices.long()
        self.unmerged = merged.view(-1)[at]  # restores a bit-exact weight in `unmerge`
        merged.view(-1)[at] = (self.unmerged + self.values).to(weight.dtype)
        return merged

    def unmerge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """The original weight, bit-exact."""
        assert self.unmerged is not None
        restored = weight.clone(memory_format=torch.contiguous_format)
        restored.view(-1)[self.indices.long()] = self.unmerged.to(weight)
        self.unmerged = None
        return restored

    # The exchange

    @torch.no_grad()
    def exchange(
        self, candidates: Tensor, scores: Tensor, count: int, optimizer: Optimizer | None
    ) -> None:
        """Replace up to `count` entries of small value by candidates [C] of large score [C].

        New entries start at 0. The optimizer's state of an entry moves with it; that of a new entry
        is initialized from the accumulated gradients, if there are any.

        Args:
            optimizer: None if it has no state for single entries.
        """
        values = to_full(self.values)
        index, order, source = regrow(self.indices, values, candidates, scores, count)
        is_new = source >= 0
        if optimizer is not None:
            for state, initial in per_entry_state(optimizer, self.values, self.candidates, source):
                state.copy_(to_shards(torch.where(is_new, initial, to_full(state)[order]), state))
        self.values.copy_(to_shards(torch.where(is_new, 0.0, values[order]), self.values))
        self.indices.copy_(index)

    def begin(self, step: int) -> None:
        """Start training after `step` updates; keeps the candidates of a resumed run."""
        if step == 0:
            self.candidates = None
            if self.step:  # after an earlier training in this process
                self.starts_at_zero = self._is_zero()
        self.step, self.calls, self.first = step, 0, None

    def _is_zero(self) -> bool:
        return not bool(to_full(self.values.detach()).any())

    def end_step(self, step: int) -> None:
        """Record that update `step` is complete; drop the candidates if accumulation ends."""
        self.step, self.calls = step, 0
        if not (accumulates(self.config, step) and accumulates(self.config, step + 1)):
            self.candidates = None


def per_entry_state(
    optimizer: Optimizer, values: nn.Parameter, candidates: Candidates | None, source: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The optimizer's tensors with one entry per value, each with initial values for new entries.

    Args:
        source: [K], the index of the candidate that each entry grew from, -1 for old entries.

    Raises:
        UnsupportedError: a tensor of bytes, which 8-bit optimizers scale by blocks.
    """
    state: Record = optimizer.state.get(values, {})
    found = {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == values.shape}
    for key, tensor in found.items():
        if tensor.dtype in (torch.uint8, torch.int8):
            raise UnsupportedError(
                f"the optimizer's {key} is {tensor.dtype}: entries scaled by blocks cannot move "
                "with the indices of method 'sparse'; use an optimizer with a 32-bit state"
            )
    group = next(g for g in optimizer.param_groups if any(p is values for p in g["params"]))
    moments = {}
    if candidates is not None:
        moments = _initial_moments(candidates, source.clamp(min=0), group, state)
    zeros = torch.zeros_like(source, dtype=torch.float32)
    return [(t, moments.get(key, zeros).to(t.dtype)) for key, t in found.items()]


def _initial_moments(
    candidates: Candidates, source: Tensor, group: Record, state: Record
) -> dict[str, Tensor]:
    """Adam's moments whose bias-corrected values are the mean gradient and mean square.

    The authors' own AdamW counts the updates of each entry in `age`, including the next one.
    """
    updates = candidates.updates
    first, second = candidates.total[source] / updates, candidates.square[source] / updates
    ages = torch.full_like(first, updates + 1)
    steps = updates if "age" in state else state.get("step")
    if "betas" in group and steps is not None:
        first *= 1 - group["betas"][0] ** steps
        second *= 1 - group["betas"][1] ** steps
    return {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second, "age": ages}
