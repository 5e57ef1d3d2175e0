"""Functions of tensors that save their inputs for backward, and compute the rest again."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petl.ops import Ctx


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `function(*tensors)`; of its graph, only `tensors` are kept for backward.

    Unlike torch's checkpointing, it keeps them as saved tensors, which hooks see and which are
    freed with the graph. torch.compile decides by itself what to recompute.

    Args:
        function: pure, without random numbers; all tensors that it reads are arguments.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*tensors)
    return _Checkpoint.apply(function, *tensors)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Ctx, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        device = tensors[0].device.type
        ctx.function = function
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = ctx.function(*inputs)
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(y, leaves, grad))
        return None, *(next(found) if need else None for need in needs)
