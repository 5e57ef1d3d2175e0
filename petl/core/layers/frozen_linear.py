"""Base layers that are nothing but a frozen matrix, so that an adapter may compute for them.

Shapes: I in, O out, R rank.
"""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from petl.ops.low_rank import add_low_rank_, low_rank_linear

KINDS = (nn.Parameter, Tensor, FakeTensor)  # one without values is of a plan: it computes alike


def is_plain(base: nn.Module, kinds: tuple[type, ...] = (nn.Parameter, Tensor)) -> bool:
    """Whether a layer is nothing but a frozen weight and bias, with nobody looking on.

    Its weight is of one of the `kinds`: that of a sharded or quantised layer is of its own.
    """
    return (
        type(base) in (nn.Linear, Conv1D)
        and type(base.weight) in kinds
        and is_unwatched(base)
        and not any(p.requires_grad for p in base.parameters(recurse=False))
    )


def is_unwatched(module: nn.Module) -> bool:
    """Whether calling a module does no more than its class says: no hooks, no replaced forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def makes_output(base: nn.Module) -> bool:
    """Whether a layer's output is new and nobody else's, so that it may be added to in place."""
    return type(base) is nn.Linear and is_unwatched(base) and not torch.compiler.is_compiling()


def as_matrix(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight [O, I] and bias of a layer that does no more to `x` than they; None of any other.

    Nor while a compiler looks on: it joins a layer and its adapter by itself.
    """
    if type(base) is not nn.Linear or torch.compiler.is_compiling() or not is_plain(base, KINDS):
        return None
    weight, bias = base.weight, base.bias
    fits = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    return (weight, bias) if fits else None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would compute a linear layer."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def low_rank_beside(
    x: Tensor, base: nn.Module, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor | None:
    """`base(x) + scale * (drop(x) A^T) B^T`, [..., O], in the fewest passes that `base` allows.

    Args:
        x: [..., I].
        A: [R, I].
        B: [O, R].
        dropout: share of x that is dropped in front of A, in [0, 1).

    Returns:
        None if `base` has to be called, and its output left as it is.
    """
    if not torch.is_grad_enabled() and dropout == 0:  # such as to decode: calls cost most here
        return add_low_rank_(base(x), x, A, B, scale) if makes_output(base) else None
    frozen = as_matrix(base, x)
    if frozen is None:
        return None
    return low_rank_linear(x.to(product_dtype(x)), frozen, A, B, scale, dropout=dropout)
