"""The sparse linear layer as a custom operator, for torch.compile.

The layer writes into the base weight for the time of a product and accumulates candidate gradients,
which cannot be traced; a custom operator is opaque to the compiler.
"""

from typing import Any

import torch
from torch import Tensor

from petl.methods.families.masks import adapter_of
from petl.ops import Ctx
from petl.ops.sparse import input_gradient, linear_forward, values_gradient


@torch.library.custom_op("petl::sparse_linear", mutates_args=())
def compiled_linear(
    x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, number: int
) -> Tensor:
    """`sparse_linear` for the adapter with this number."""
    return linear_forward(x, weight, bias, values, adapter_of(number).support)


@compiled_linear.register_fake
def _(x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], adapter_of(number).shape.out_features)


@torch.library.custom_op("petl::sparse_linear_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor, x: Tensor, values: Tensor, weight: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    adapter = adapter_of(number)
    to_x = input_gradient(grad, weight, values, adapter.support)
    to_values = values_gradient(grad, x, adapter.support, adapter.products)
    return to_x, to_values.to(values.dtype)


@_compiled_backward.register_fake
def _(
    grad: Tensor, x: Tensor, values: Tensor, weight: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(values)


def _keep(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, weight, _, ctx.number = inputs
    ctx.save_for_backward(x, values, weight)  # bias is frozen


def _backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_compiled_backward(grad, *ctx.saved_tensors, ctx.number), None, None, None


compiled_linear.register_autograd(_backward, setup_context=_keep)
