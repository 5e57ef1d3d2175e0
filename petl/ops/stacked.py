"""Linear layers and norms whose weights may be those of several models side by side.

Shapes: G models, T tokens, I in, O out. Vectors of several models are [G, 1, O].
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`: x [..., I] and W [O, I]; or x [G, T, I] and W [G, O, I], each with its own."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    if bias is None:
        return x @ weight.mT
    (G, T, I), O = x.shape, weight.shape[1]
    if O >= I:
        return torch.baddbmm(bias, x, weight.mT)
    z_GOT = torch.baddbmm(bias.mT, weight, x.mT)  # the narrow side as rows: up to 1.6 times faster
    return z_GOT.view(G, 1, O) if T == 1 else z_GOT.mT  # products are slow with strides of mT here


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Norm over the last dimension: x [..., I] and weight [I]; or x [G, T, I] and [G, 1, I]."""
    if weight.dim() == 1:
        return F.layer_norm(x, weight.shape, weight, bias)
    return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)
