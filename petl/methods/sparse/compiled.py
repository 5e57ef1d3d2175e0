"""The sparse linear layer as a custom operator, for torch.compile.

The layer writes into the base weight for the time of a product and accumulates candidate gradients,
which cannot be traced; a custom operator is opaque to the compiler. An operator takes tensors and
numbers only, so adapters are passed by number.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from petl.ops.sparse import input_gradient, linear_forward, values_gradient

# weak: the registry must not keep deleted models alive
_ADAPTERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register_adapter(adapter: Any) -> int:
    """Register an adapter, weakly referenced, and return its number."""
    number = next(_numbers)
    _ADAPTERS[number] = adapter
    return number


@torch.library.custom_op("petl::sparse_linear", mutates_args=())
def compiled_linear(
    x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, number: int
) -> Tensor:
    """`sparse_linear` for the adapter with this number."""
    return linear_forward(x, weight, bias, values, _ADAPTERS[number].support)


@compiled_linear.register_fake
def _(x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], _ADAPTERS[number].shape.out_features)


@torch.library.custom_op("petl::sparse_linear_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor, x: Tensor, values: Tensor, weight: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    adapter = _ADAPTERS[number]
    to_x = input_gradient(grad, weight, values, adapter.support)
    to_values = values_gradient(grad, x, adapter.support, adapter.products)
    return to_x, to_values.to(values.dtype)


@_compiled_backward.register_fake
def _(
    grad: Tensor, x: Tensor, values: Tensor, weight: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(values)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, weight, _, ctx.number = inputs
    ctx.save_for_backward(x, values, weight)  # bias is frozen


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_compiled_backward(grad, *ctx.saved_tensors, ctx.number), None, None, None


compiled_linear.register_autograd(_backward, setup_context=_keep)
