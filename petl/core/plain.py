"""Base layers that are nothing but a frozen matrix, so that an adapter may compute for them."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_plain(base: nn.Module) -> bool:
    """Whether a layer is nothing but a frozen weight and bias, with nobody looking on."""
    return (
        type(base) in (nn.Linear, Conv1D)
        and type(base.weight) in (nn.Parameter, Tensor)
        and is_unwatched(base)
        and not any(p.requires_grad for p in base.parameters(recurse=False))
    )


def is_unwatched(module: nn.Module) -> bool:
    """Whether calling a module does no more than its class says: no hooks, no replaced forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return not any(hooks) and not module._backward_pre_hooks and "forward" not in vars(module)


def as_matrix(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight [O, I] and bias of a layer that does no more to `x` than they; None of any other.

    Nor while a compiler looks on: it joins a layer and its adapter by itself.
    """
    if type(base) is not nn.Linear or not is_plain(base) or torch.compiler.is_compiling():
        return None
    weight, bias = base.weight, base.bias
    fits = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    return (weight, bias) if fits else None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would compute a linear layer."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype
