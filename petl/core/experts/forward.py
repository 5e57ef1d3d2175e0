"""The forward pass of a module of experts, with updates of its stacks, and the class that has it.

Shapes: T tokens, K experts of each token, S = T K rows, E experts, H width of the tokens.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer
from petl.core.experts.layout import ExpertsLayout, Routing, experts_of
from petl.core.layers.class_swap import SwappedClass, original_class, swap_class
from petl.core.layers.grouped import drawing_from
from petl.core.layers.mixed_batch import AdapterRows
from petl.errors import UnsupportedError
from petl.ops.grouped_experts import ExpertRows, StackedFactors, grouped_linear

# An update of a stack: factors, which are computed with it, or a function (x [S, I], rows) that
# returns the product with the updated stack, [S, O], its bias included; rows are sorted.
Update = StackedFactors | Callable[[Tensor, ExpertRows], Tensor]
Updates = Mapping[str, Update]  # by name of the parameter


class MixedUpdates(NamedTuple):
    """Updates of a batch whose rows have adapters of their own, by the name of the adapter.

    Attributes:
        rows: the adapter of each row.
        updates: of each adapter.
        generators: random numbers of dropout of each adapter; without one, the default ones.
    """

    rows: AdapterRows
    updates: Mapping[str, Updates]
    generators: Mapping[str, torch.Generator | None] = MappingProxyType({})


class UpdatedExperts(SwappedClass, nn.Module):
    """A module of experts whose `forward` takes updates of its stacks as one more argument.

    They come with a call, so that hooks of the module, which gather or move its weights, run first.
    """

    computes_as_before: ClassVar[bool] = True

    def forward(
        self, *args: object, updates: Updates | MixedUpdates | None = None, **kwargs: object
    ) -> Tensor:
        """Compute as the module itself, or, with updates, by `updated_forward`."""
        if updates is None:
            return super().forward(*args, **kwargs)
        # read for each call, since flags may be set after wrapping (expert parallelism)
        layout = experts_of(self)
        assert layout is not None
        inputs = (*args, *kwargs.values())
        if isinstance(updates, MixedUpdates):
            return mixed_forward(self, layout, inputs, updates)
        return updated_forward(self, layout, inputs, updates)


def accept_updates(module: nn.Module) -> None:
    """Let `forward` of a module of experts take `updates`; without them it computes as before."""
    swap_class(module, UpdatedExperts)


class ShapedExperts(UpdatedExperts):
    """A module of experts without adapters that computes by `updated_forward` nevertheless."""

    def forward(
        self, *args: object, updates: Updates | MixedUpdates | None = None, **kwargs: object
    ) -> Tensor:
        """Compute as with updates of nothing."""
        return super().forward(*args, updates=updates or {}, **kwargs)


def on_shapes(model: nn.Module) -> None:
    """Let the experts of a model compute on shapes alone, for which torch lacks some products."""
    for module in model.modules():
        is_adapted = isinstance(module, UpdatedExperts | BaseTunerLayer)
        if not is_adapted and experts_of(module) is not None:
            swap_class(module, ShapedExperts)


def updated_forward(
    module: nn.Module, layout: ExpertsLayout, inputs: tuple[Any, ...], updates: Updates
) -> Tensor:
    """Return the output of a module of experts for its inputs, with updates of its stacks.

    Args:
        module: with the parameters that the layout names.
        layout: of the module.
        inputs: of its own forward pass, in order, see `Routing`.
        updates: by name of the parameter; those without are multiplied as they are.
    """
    projections = _Projections(module, layout, updates)
    if layout.routing is Routing.SIZES:
        x, sizes = inputs
        return projections(layout.up, x, ExpertRows.of_sizes(sizes))
    if layout.routing is Routing.ALL:
        (x,) = inputs
        # all tokens of the first expert, then all of the second, ...
        count = layout.count(module)
        return projections.expert(x, ExpertRows.of_sizes([len(x) // count] * count))
    return _routed(projections, *inputs)


def mixed_forward(
    module: nn.Module, layout: ExpertsLayout, inputs: tuple[Any, ...], mixed: MixedUpdates
) -> Tensor:
    """Return the output of a module of experts for a batch with several adapters.

    The tokens of an adapter's rows go through the experts together, as those of a batch of its own.

    Raises:
        UnsupportedError: it is not known which row of the batch a token is of.
    """
    x, *routes = inputs
    # [C, T, H], T tokens of the batch in its order: once, or once for each expert
    copies = x.unflatten(0, (layout.count(module) if layout.routing is Routing.ALL else 1, -1))
    rows, tokens = len(mixed.rows), copies.shape[1]
    if layout.routing is Routing.SIZES or tokens % rows:
        kind = original_class(module).__name__
        raise UnsupportedError(
            f"adapter_names is not possible: {kind} gets {tokens} tokens in an order of its own, "
            f"which does not tell those of {rows} rows apart; call the model once for each adapter"
        )
    order = torch.arange(tokens, device=x.device).view(rows, -1)
    y = torch.empty_like(copies)
    for name, places in mixed.rows.places.items():
        own = order[places].flatten()
        part = copies[:, own].flatten(0, 1), *(each[own] for each in routes)
        with drawing_from(mixed.generators.get(name)):
            out = updated_forward(module, layout, part, mixed.updates.get(name, {}))
        y[:, own] = out.unflatten(0, (len(copies), -1))
    return y.flatten(0, 1)


class _Projections:
    """The products of one pass of a module of experts."""

    def __init__(self, module: nn.Module, layout: ExpertsLayout, updates: Updates) -> None:
        self.module, self.layout, self.updates = module, layout, updates

    def __call__(self, name: str, x: Tensor, rows: ExpertRows) -> Tensor:
        """Multiply rows x [S, I] with the stack called `name`, [S, O]."""
        update = self.updates.get(name)
        if update is not None and not isinstance(update, StackedFactors):
            return update(x, rows)
        weight = getattr(self.module, name)
        bias = getattr(self.module, f"{name}_bias") if self.layout.bias else None
        return grouped_linear(x, weight, rows, bias, update, transposed=self.layout.transposed)

    def expert(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """Return the outputs of whole experts for rows x [S, H]."""
        layout = self.layout
        assert layout.down is not None
        h = layout.activated(self.module, self(layout.up, x, rows))
        y = self(layout.down, h, rows)
        if layout.norm:
            y = self.module.get_submodule("post_expert_norm")(y)
        # experts without weights
        if layout.identity and rows.rest is not None:
            y = torch.where(rows.rest, x, y)
        return y


def _routed(projections: _Projections, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the outputs of each token's experts, [T, H].

    Args:
        projections: of the module.
        x: [T, H].
        index: [T, K], of the experts of each token.
        weights: [T, K].
    """
    module, layout = projections.module, projections.layout
    T, K = index.shape
    count = layout.count(module)
    # of other processes, with a weight of 0
    has_rest = layout.identity or getattr(module, "_is_expert_parallel", False)
    flat = index.reshape(-1)
    if has_rest and not layout.identity:
        weights = weights.masked_fill(index >= count, 0.0)
    factors = all(isinstance(each, StackedFactors) for each in projections.updates.values())
    # sorting needs no copies of weights, but its shapes depend on values
    if factors and (x.is_meta or layout.implementation(module) == "batched_mm"):
        rows = ExpertRows(flat, count, None, has_rest)
        y = projections.expert(x.repeat_interleave(K, dim=0), rows)
        return (y * weights.reshape(-1, 1)).view(T, K, -1).sum(1).to(x.dtype)
    experts, order = torch.sort(flat)
    rows = ExpertRows.ordered(experts, count, has_rest=has_rest)
    rows.tokens, rows.total = order // K, T
    y = projections.expert(_taken(x, rows.tokens), rows)
    # the inverse of the sort; an index_add would sum in an order that changes on a GPU
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    each = y.index_select(0, back).view(T, K, -1)
    if weights.dtype != y.dtype:
        # of more digits
        return (each * weights.unsqueeze(-1)).sum(1).to(x.dtype)
    # without a weighted copy of the rows; in their own dtype, as the products
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(weights.unsqueeze(1), each).squeeze(1).to(x.dtype)


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """Return these rows of x."""
    # the gradient of the first is faster, and on a GPU adds in an order that changes
    return x.index_select(0, rows) if x.device.type == "cpu" else x[rows]
