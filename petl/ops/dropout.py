"""Dropout masks that are cheap to draw: one or two random bytes per value."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

BITS = 16  # of a value of `dropout`
READ_AS = {8: torch.uint8, 16: torch.int16}  # random bits of a value, by their number


def keep_mask(
    x: Tensor, p: float, generator: torch.Generator | None = None, *, bits: int = 8
) -> tuple[Tensor, float]:
    """Return a uint8 mask of the shape of `x`, 0 with probability p, and its expected mean.

    On a CPU, p in (0, 1) is rounded to a multiple of 2^-bits, but not to 0 or 1: each value takes
    that many bits of the generator (None: the default one), which is five to ten times faster than
    a float each.

    Args:
        bits: 8 or 16.
    """
    if x.device.type != "cpu":
        mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        return mask.bernoulli_(1 - p, generator=generator), 1 - p
    # a number of these bits is below `limit` with probability limit / levels
    levels, read_as = 2**bits, READ_AS[bits]
    limit = min(max(round(levels * p), 1), levels - 1)
    # 64 random bits at a time, read as numbers
    words = torch.empty(-(-x.numel() * bits // 64), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    mask = words.view(read_as)[: x.numel()] >= torch.iinfo(read_as).min + limit
    return mask.view(torch.uint8).view(x.shape), 1 - limit / levels


def dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Return `x` after dropout with probability p in (0, 1), from 16 random bits a value on a CPU.

    A TorchFunctionMode gets the call as it gets those of torch.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(dropout, (x,), x, p, generator)
    mask, mean = keep_mask(x, p, generator, bits=BITS)
    return (x * mask).mul_(1 / mean)
