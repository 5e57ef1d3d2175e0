"""A gated MLP that keeps a part of its channels for backward.

The forward pass is exact. Of gate and up only the channels with the largest norms are kept, and
backward takes the others for 0, as inputs of the last layer too, which biases the gradients. The
inputs of gate and up are computed again from those of the norm before them, exactly.

Shapes: P tokens of all rows, F channels, K channels that are kept.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petl.core.layers.class_swap import SwappedClass, forward_code
from petl.core.parameters import is_norm
from petl.efficiency.recompute import Recomputable, recomputed, saved_as_recipe
from petl.ops import Ctx


class _KeptChannels(Recomputable):
    """`act(z) * up` of [..., F], with the gradient of K channels."""

    @staticmethod
    def forward(
        ctx: Ctx, act: Callable[[Tensor], Tensor], keep: float, z: Tensor, up: Tensor
    ) -> Tensor:
        a = act(z)
        norms = a.flatten(0, -2).norm(dim=0) + up.flatten(0, -2).norm(dim=0)
        # one at least, or nothing of the MLP would learn
        count = max(1, math.ceil(keep * len(norms)))
        channels = norms.topk(count).indices
        ctx.save_for_backward(channels, z[..., channels], up[..., channels])
        ctx.act, ctx.channels = act, len(norms)
        return a * up

    @staticmethod
    def output(node: Ctx) -> Tensor:
        channels, z, up = Recomputable.saved(node)
        whole = z.new_zeros(*z.shape[:-1], node.channels)
        return whole.index_copy_(-1, channels, node.act(z) * up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (channels, z, up), ctx.unpacked = Recomputable.saved(ctx), None
        parts = _gradients(ctx.act, z, up, grad[..., channels])
        whole = (*grad.shape[:-1], ctx.channels)
        # one after the other and in place: the activations of all layers before are still held
        spread = (grad.new_zeros(whole).index_copy_(-1, channels, parts.pop()) for _ in range(2))
        return None, None, *spread


def _gradients(
    act: Callable[[Tensor], Tensor], z: Tensor, up: Tensor, grad: Tensor
) -> list[Tensor]:
    """Return the gradients of `up` and `z` from that of their product, which is written over."""
    with torch.enable_grad():  # a graph of its own for the gradient of the activation
        leaf = z.detach().requires_grad_()
        a = act(leaf)
    to_up = grad * a.detach()
    (to_z,) = torch.autograd.grad(a, leaf, grad.mul_(up))
    return [to_up, to_z]


class KeptMlp(SwappedClass):
    """Mixin for a gated MLP.

    Attributes:
        mlp_keep: share of the channels that are kept for backward, rounded up.
    """

    mlp_keep: float

    def forward(self: Any, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return super().forward(x)
        with saved_as_recipe(x):
            gate, up = self.gate_proj(x), self.up_proj(x)
        product = _KeptChannels.apply(self.act_fn, self.mlp_keep, gate, up)
        with saved_as_recipe(product):
            return self.down_proj(product)


class RecomputedNorm(SwappedClass):
    """Mixin for a norm, whose output `KeptMlp` does not keep."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return super().forward(x)
        if any(weight.requires_grad for weight in self.parameters()):
            return super().forward(x)
        return recomputed(super().forward, x)


def norms_in(layer: nn.Module) -> list[nn.Module]:
    """Return the norms of the hidden states of a layer.

    Not those of torch: their dtype is autocast's, which a backward pass does not have.
    """
    found = []
    for norm in layer.children():
        code = forward_code(norm)
        takes_one = code is not None and code.co_argcount == 2
        if takes_one and is_norm(norm) and not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
            found.append(norm)
    return found
