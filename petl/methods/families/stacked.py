"""Linear layers and norms with one weight, or with the stacked weights of several models.

Shapes: G models, T tokens, I in, O out. Stacked vectors are [G, 1, O].
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` for x [..., I] and W [O, I], or per model for [G, T, I] and [G, O, I]."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    if bias is None:
        return x @ weight.mT
    (G, T, I), O = x.shape, weight.shape[1]
    if O >= I:
        return torch.baddbmm(bias, x, weight.mT)
    # the narrow side as rows: measured, up to 1.6 times faster
    z_GOT = torch.baddbmm(bias.mT, weight, x.mT)
    # for one token a view with plain strides: later products are slow with those of mT
    return z_GOT.view(G, 1, O) if T == 1 else z_GOT.mT


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer-normalize x [..., I] with weight [I], or x [G, T, I] with weights [G, 1, I]."""
    if weight.dim() == 1:
        return F.layer_norm(x, weight.shape, weight, bias)
    return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)
