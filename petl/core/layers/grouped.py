"""Modules in place of adapted layers, for batches whose rows are of several adapters that train.

Shapes: K adapters, N rows of each: an input is [K N, ..., I], with the rows of adapter k together.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from petl.core.layers.mixed_batch import stacked
from petl.ops.dropout import dropout as fast_dropout
from petl.ops.grouped_low_rank import (
    add_grouped_low_rank,
    grouped_low_rank_linear,
    grouped_masks,
)
from petl.ops.low_rank import cast_for_product, frozen_weight_and_bias


class StackedParameter:
    """One parameter of K adapters, [K, ...], as a leaf of the autograd graph.

    Each adapter's parameter is a view of its slice. A smaller one than the largest is filled up
    with zeros. It keeps memory of its own, which is copied into the leaf before a pass, and gets
    its part of the gradient: the rest is never read, so it takes no part in clipping or decay.

    Attributes:
        leaf: the stacked values.
        parameters: those of the adapters, in the order of the slices.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        shape = [max(sizes) for sizes in zip(*(p.shape for p in parameters), strict=True)]
        first = parameters[0]
        self.leaf = first.new_zeros((len(parameters), *shape)).requires_grad_()
        # by slice: the part that the parameter fills
        self._parts = [tuple(slice(size) for size in p.shape) for p in parameters]
        self._apart: list[tuple[Tensor, Tensor]] = []
        for p, slot, part in zip(parameters, self.leaf.data, self._parts, strict=True):
            slot[part].copy_(p.data)
            if p.shape == slot.shape:
                # the same Parameter, as optimizers hold it; nobody else may set `.data`
                p.data = slot
            else:  # a view of a part would not be contiguous, as fused optimizers need it
                self._apart.append((slot[part], p))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the values of parameters that are no views into the leaf."""
        if self._apart:
            slots, own = zip(*self._apart, strict=True)
            torch._foreach_copy_(list(slots), [p.data for p in own])

    def hand_out(self) -> None:
        """Add each slice of the leaf's gradient to that of its parameter, and clear the leaf's."""
        # cleared, so that the gradients of two micro-batches are added in the parameters only
        grad, self.leaf.grad = self.leaf.grad, None
        if grad is None:
            return
        for p, slot, part in zip(self.parameters, grad.contiguous(), self._parts, strict=True):
            own = slot if p.shape == slot.shape else slot[part].contiguous()
            # a view, and safe to add to: the leaf no longer holds this gradient
            p.grad = own if p.grad is None else p.grad.add_(own)

    def release(self) -> None:
        """Give all parameters memory of their own again."""
        for p in self.parameters:
            p.data = p.data.clone()


def by_adapter(x: Tensor, K: int) -> Tensor:
    """Return x [K N, ..., I] as [K, T, I], T the tokens of all rows of an adapter."""
    return x.reshape(K, -1, x.shape[-1])


class GroupedLayer(nn.Module):
    """A base layer that computes the rows of all adapters at once."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer, whose dtype some models read."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return cast("Tensor | None", self.base_layer.bias)


class GroupedUpdate(NamedTuple):
    """Low-rank updates of K adapters: A [K, R, I], B [K, O, R], gate [K, T, E] or None: 1."""

    A: Tensor
    B: Tensor
    scales: Sequence[float]
    gate: Tensor | None = None


class GroupedLowRank(GroupedLayer):
    """A base layer with K low-rank updates, each of rows of its own.

    Attributes:
        generators: each adapter's random numbers of dropout; None: the default ones.
    """

    def __init__(self, base_layer: nn.Module, generators: Sequence[torch.Generator | None]) -> None:
        super().__init__(base_layer)
        self.generators = generators

    @property
    def stacks(self) -> Sequence[StackedParameter]:
        """The stacked parameters of this layer, if any."""
        return ()

    def rates(self) -> Sequence[float]:
        """Return the probability with which each adapter drops its input now."""
        raise NotImplementedError

    def updates(self, x: Tensor) -> GroupedUpdate:
        """Return the updates for the inputs x [K, T, I]."""
        raise NotImplementedError

    def finish(self, y: Tensor, x: Tensor, update: GroupedUpdate) -> Tensor:
        """Return the output y [K, T, O], with what its backward pass computes besides."""
        return y

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        K, base = len(self.generators), self.base_layer
        # the conditions under which an adapter alone is fused, for the same results
        frozen = None if args or kwargs else frozen_weight_and_bias(base, x)
        y = None if frozen is not None else base(x, *args, **kwargs)
        tokens = x.shape[:-1]
        x = by_adapter(x, K)
        update = self.updates(x)
        A, B, scales, gate = update
        own = x if y is not None else cast_for_product(x)
        mask, means = grouped_masks(own, self.rates(), self.generators)
        # the scaling of dropout: the mask holds 0 and 1, and its mean is not quite 1 - p on a CPU
        scales = [scale / mean for scale, mean in zip(scales, means, strict=True)]
        if frozen is not None:
            out = grouped_low_rank_linear(own, frozen, A, B, scales, mask, gate)
        else:  # quantized, Conv1D, or with hooks
            assert y is not None
            out = add_grouped_low_rank(by_adapter(y, K), own, A, B, scales, mask, gate)
        return self.finish(out, x, update).view(*tokens, out.shape[-1])


class GroupedLora(GroupedLowRank):
    """PEFT's LoRA: A and B of all adapters are stacked parameters."""

    def __init__(
        self,
        base_layer: nn.Module,
        generators: Sequence[torch.Generator | None],
        factors: Sequence[tuple[nn.Parameter, nn.Parameter, float]],
        dropouts: Sequence[nn.Module],
    ) -> None:
        super().__init__(base_layer, generators)
        A, B, self.scales = zip(*factors, strict=True)
        self.A, self.B = StackedParameter(A), StackedParameter(B)
        self.dropouts = tuple(dropouts)  # no modules of this one

    @property
    def stacks(self) -> Sequence[StackedParameter]:
        return self.A, self.B

    def rates(self) -> Sequence[float]:
        # PEFT uses Identity for a probability of 0
        return [d.p if isinstance(d, nn.Dropout) and d.training else 0.0 for d in self.dropouts]

    def updates(self, x: Tensor) -> GroupedUpdate:
        return GroupedUpdate(self.A.leaf, self.B.leaf, self.scales)


class GroupedFactors(GroupedLowRank):
    """Adapters whose factors come from other parameters, such as MoS: stacked in each pass."""

    def __init__(
        self,
        base_layer: nn.Module,
        generators: Sequence[torch.Generator | None],
        adapters: Sequence[Any],
    ) -> None:
        super().__init__(base_layer, generators)
        self.adapters = tuple(adapters)

    def rates(self) -> Sequence[float]:
        return [adapter.drop_rate for adapter in self.adapters]

    def updates(self, x: Tensor) -> GroupedUpdate:
        return stacked_factors([adapter.plain_factors() for adapter in self.adapters])


def stacked_factors(factors: Sequence[Any]) -> GroupedUpdate:
    """Return the updates of these factors, filled up with zeros to the largest rank."""
    R = max(len(each.A) for each in factors)
    A = [F.pad(each.A, (0, 0, 0, R - len(each.A))) for each in factors]
    B = [F.pad(each.B, (0, R - each.B.shape[1])) for each in factors]
    return GroupedUpdate(torch.stack(A), torch.stack(B), [each.scale for each in factors])


class InputHook:
    """Forward pre-hook of a module: its first input, for layers that adapt another module's."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
    ) -> None:
        self.value = args[0] if args else next(iter(kwargs.values()))

    def pop(self) -> Tensor:
        """Return the input of this pass and forget it."""
        value, self.value = self.value, None
        assert value is not None
        return value


class GroupedAdapters(GroupedLayer):
    """A base layer that is called once, and K adapters that compute their own rows one by one.

    For adapters of any kind. They are in a tuple, so that they are no modules of this one: each is
    part of a model of its own.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapters: Sequence[nn.Module],
        generators: Sequence[torch.Generator | None],
        captured: InputHook | None,
    ) -> None:
        super().__init__(base_layer)
        self.adapters, self.generators = tuple(adapters), generators
        self.captured = captured

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        captured = self.captured
        return each_alone(self, self.adapters, self.generators, x, args, kwargs, captured)


class GroupedNetworks(GroupedLayer):
    """Adapters whose computation broadcasts over the stacked tensors of all: bottlenecks."""

    def __init__(
        self, base_layer: nn.Module, adapters: Sequence[nn.Module], captured: InputHook | None
    ) -> None:
        super().__init__(base_layer)
        self.adapters, self.captured = tuple(adapters), captured

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y, K = self.base_layer(x, *args, **kwargs), len(self.adapters)
        x = x if self.captured is None else self.captured.pop()
        # in each pass, so that gradients reach the parameters of each
        together = stacked(self.adapters, None)
        return together(by_adapter(x, K), by_adapter(y, K)).view(y.shape)


def each_alone(
    layer: GroupedLayer,
    adapters: Sequence[nn.Module],
    generators: Sequence[torch.Generator | None],
    x: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    captured: InputHook | None = None,
) -> Tensor:
    """Return the output of a layer whose base is called once and whose adapters one by one."""
    y = layer.base_layer(x, *args, **kwargs)
    x = x if captured is None else captured.pop()
    K, outputs = len(adapters), []
    # equal chunks: batches with fewer rows were filled up to N
    for adapter, generator, *own in zip(adapters, generators, x.chunk(K), y.chunk(K), strict=True):
        with drawing_from(generator):
            outputs.append(adapter(*own))
    return torch.cat(outputs)


class GroupedModules(nn.Module):
    """K copies of a module that trains as a whole, such as a head, each for its own rows."""

    def __init__(
        self, modules: Sequence[nn.Module], generators: Sequence[torch.Generator | None]
    ) -> None:
        super().__init__()
        self.copies, self.generators = tuple(modules), generators

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        outputs = []
        parts = x.chunk(len(self.copies))
        for module, generator, own in zip(self.copies, self.generators, parts, strict=True):
            with drawing_from(generator):
                outputs.append(module(own, *args, **kwargs))
        return torch.cat(outputs)


# Random numbers

_is_alone: ContextVar[bool] = ContextVar("_is_alone", default=False)  # inside `drawing_from`


class RowDropout(TorchFunctionMode):
    """Inside the block, the base's dropout draws for each adapter's rows from its own generator.

    The rows of an adapter get the masks of a pass of their own. Random numbers that are neither of
    `dropout` nor of attention come from the default generators, as ever.

    Args:
        generators: of the K adapters.
        rows: N, of each.
    """

    def __init__(self, generators: Sequence[torch.Generator], rows: int) -> None:
        super().__init__()
        self.generators, self.rows = generators, len(generators) * rows

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        given = kwargs or {}
        if not _is_alone.get():
            if func is F.dropout:
                return self.dropout(*args, **given)
            if func is fast_dropout:
                return self.fast_dropout(*args, **given)
            if func is F.scaled_dot_product_attention:
                return self.attention(*args, **given)
            if func is torch.rand and args[:1] == ([],):
                return self.number(*args, **given)
        return func(*args, **given)

    def dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Return `x` after dropout, as `torch.nn.functional.dropout`."""
        if not training or p == 0 or len(x) != self.rows:
            return F.dropout(x, p, training, inplace)
        if x.device.type != "cpu" or p == 1:  # a fused kernel, with an order of its own
            return self.by_adapter(lambda own: F.dropout(own, p), [x])
        # what torch computes on a CPU, without a copy of the states for each adapter
        mask = torch.empty_like(x)
        for own, generator in zip(mask.chunk(len(self.generators)), self.generators, strict=True):
            own.bernoulli_(1 - p, generator=generator)
        return x * mask.div_(1 - p)

    def fast_dropout(self, x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
        """Return `x` after `petl.ops.dropout.dropout`."""
        if generator is not None or len(x) != self.rows:
            return fast_dropout(x, p, generator)
        parts = zip(x.chunk(len(self.generators)), self.generators, strict=True)
        return torch.cat([fast_dropout(own, p, each) for own, each in parts])

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **given: Any,
    ) -> Tensor:
        """Return `torch.nn.functional.scaled_dot_product_attention`."""
        tensors: list[Tensor | None] = [query, key, value, attn_mask]

        def attend(*tensors: Tensor | None) -> Tensor:
            q, k, v, mask = cast(Any, tensors)
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, **given)

        if dropout_p == 0 or len(query) != self.rows:
            return attend(*tensors)
        return self.by_adapter(attend, tensors)

    def number(self, shape: list[int], **given: Any) -> Tensor:
        """Return one number, as models draw it for each layer that they might leave out.

        Every adapter's generator draws one, of which the first is returned: in training together
        no layer is left out.
        """
        if self.generators[0].device.type != "cpu":
            return torch.rand(shape, **given)  # of the processor, from which nothing else is drawn
        drawn = [torch.rand(shape, generator=g, **given) for g in self.generators]
        return drawn[0]

    def by_adapter(
        self, function: Callable[..., Tensor], tensors: Sequence[Tensor | None]
    ) -> Tensor:
        """Call a function with the rows of each adapter; return the rows of all."""
        K = len(self.generators)
        # a mask may be one for all rows
        parts = [t.chunk(K) if t is not None and len(t) == self.rows else [t] * K for t in tensors]
        outputs = []
        for generator, *own in zip(self.generators, *parts, strict=True):
            with drawing_from(generator):
                outputs.append(function(*own))
        return torch.cat(outputs)


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Generator[None]:
    """Inside the block, draw the default random numbers of the generator's device from it."""
    if generator is None:
        yield
        return
    device = generator.device
    # torch itself is the module of the CPU, whose functions take no device
    source: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    where = () if device.type == "cpu" else (device,)
    before = source.get_rng_state(*where)
    source.set_rng_state(generator.get_state(), *where)
    alone = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(alone)
        generator.set_state(source.get_rng_state(*where))
        source.set_rng_state(before, *where)
