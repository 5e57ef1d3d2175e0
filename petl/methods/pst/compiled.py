"""The layer as a custom operator, for torch.compile.

The number of pruned entries changes with the steps, which would compile a new graph each time; an
operator is opaque to the compiler.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petl.methods.families.masks import adapter_of
from petl.methods.pst.pruned import PruningFactors, backward_pass
from petl.ops import Ctx
from petl.ops.masks import all_kept, packed_size


@torch.library.custom_op("petl::pst_linear", mutates_args=())
def compiled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[Tensor], number: int
) -> tuple[Tensor, Tensor]:
    """Return the output of the adapter with this number, and its packed mask."""
    adapter = adapter_of(number)
    masked, packed = adapter.masked_weight(weight, x.dtype)
    # a tensor of this operator's own, of one shape whether something is pruned or not
    kept = all_kept(adapter.size, x.device) if packed is None else packed.clone()
    return F.linear(x, masked, None if bias is None else bias.to(x.dtype)), kept


@compiled_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[Tensor], number: int
) -> tuple[Tensor, Tensor]:
    packed = x.new_empty(packed_size(weight.numel()), dtype=torch.uint8)
    return x.new_empty(*x.shape[:-1], len(weight)), packed


@torch.library.custom_op("petl::pst_linear_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor, x: Tensor, weight: Tensor, packed: Tensor, factors: list[Tensor], number: int
) -> list[Tensor]:
    scales, found = adapter_of(number).scales, PruningFactors(*factors)
    to_x, to_factors = backward_pass(grad, x, weight, packed, found, scales, (True, True))
    assert to_x is not None
    assert to_factors is not None
    return [
        to_x,
        *(gradient.clone(memory_format=torch.contiguous_format) for gradient in to_factors),
    ]


@_compiled_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, packed: Tensor, factors: list[Tensor], number: int
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x, *factors)]


def _keep(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, factors, ctx.number = inputs
    ctx.save_for_backward(x, weight, output[1], *factors)


def _backward(ctx: Ctx, grad: Tensor, _: object) -> tuple[object, ...]:
    x, weight, packed, *factors = ctx.saved_tensors
    to_x, *to_factors = _compiled_backward(grad, x, weight, packed, factors, ctx.number)
    return to_x, None, None, to_factors, None


compiled_linear.register_autograd(_backward, setup_context=_keep)
