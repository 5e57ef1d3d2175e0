"""Dropout masks that are cheap to draw: one random byte per value."""

import torch
from torch import Tensor


def keep_mask(
    x: Tensor, p: float, generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    """Return a uint8 mask of the shape of `x`, 0 with probability p, and its expected mean.

    On a CPU, p in (0, 1) is rounded to a multiple of 1/256, but not to 0 or 1: each value takes a
    byte of the generator (None: the default one), which is ten times faster than a float each.
    """
    if x.device.type != "cpu":
        mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        return mask.bernoulli_(1 - p, generator=generator), 1 - p
    # a byte is below `limit` with probability limit / 256
    limit = min(max(round(256 * p), 1), 255)
    # 64 random bits at a time, read as bytes
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    mask = words.view(torch.uint8)[: x.numel()] >= limit
    return mask.view(torch.uint8).view(x.shape), 1 - limit / 256
