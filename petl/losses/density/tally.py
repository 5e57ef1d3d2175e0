"""What one training forward counted, and how the count reaches the gradient."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petl.core.distributed import summed
from petl.core.layers.context import add_gradient
from petl.ops.density import add_slope


class Tally:
    """The values that each layer counted in one forward pass.

    Layers may be called several times, or not at all; the term is a mean over the values of a layer
    and over the layers called in a stack. Backward passes read it once the forward pass is over.

    Args:
        stacks: by layer, the stack that it stands in.
        weight: 0-d: the gradient of the loss with respect to the term.
    """

    def __init__(self, stacks: Mapping[str, str], weight: Tensor) -> None:
        self.stacks, self.weight = stacks, weight
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}
        self.has_gradient = False

    def add(self, layer: str, total: Tensor, count: Tensor | int) -> None:
        """Count `total` of `count` values of a layer as not silent."""
        self.sums[layer] = self.sums[layer] + total if layer in self.sums else total
        self.counts[layer] = self.counts.get(layer, 0) + count

    def count_compiled(self, a: Tensor, layer: str, eps: float, mask: Tensor | None) -> Tensor:
        """`a`, counted by what a compiler fuses by itself; its layers are all called, and once."""
        square = a.float().square()
        kept = square / (square + eps)
        count: Tensor | int = kept.numel()
        if mask is not None:
            weight = mask.float()[:, None]
            kept = kept.reshape(len(weight), -1) * weight
            count = weight.sum() * kept.shape[1]
        total, layers = kept.sum(), list(self.stacks.values()).count(self.stacks[layer])
        self.add(layer, total.detach(), count)
        self.has_gradient = self.has_gradient or a.requires_grad
        return add_gradient(a, total / (count * layers), self.weight)

    @torch.no_grad()
    def over_processes(self, share: Tensor) -> None:
        """Count what all processes counted; they average their gradients.

        A process whose rows have no `share` in the step, 0-d, counts nothing and gets no gradient.
        """
        is_real, layers = (share != 0).double(), list(self.stacks)
        parts = [
            torch.as_tensor(found.get(layer, 0)).to(is_real) * is_real
            for found in (self.sums, self.counts)
            for layer in layers
        ]
        every = summed(torch.stack([self.weight.to(is_real), *parts]))
        self.weight = (every[0] * is_real).to(self.weight.dtype)
        sums, counts = every[1:].float().split(len(layers))
        called = [i for i, layer in enumerate(layers) if layer in self.sums]
        self.sums = {layers[i]: sums[i] for i in called}
        self.counts = {layers[i]: counts[i] for i in called}

    def value(self) -> Tensor:
        """The density term D, 0-d."""
        means = [total / self._divisor(layer) for layer, total in self.sums.items()]
        return torch.stack([mean.to(self.weight.device) for mean in means]).sum()

    def factor(self, layer: str) -> Tensor:
        """The gradient of the loss with respect to the layer's sum, 0-d."""
        divisor = self._divisor(layer)
        return self.weight / (divisor.to(self.weight) if isinstance(divisor, Tensor) else divisor)

    def _divisor(self, layer: str) -> Tensor | int:
        called = sum(self.stacks[other] == self.stacks[layer] for other in self.sums)
        return self.counts[layer] * called


def count_in_loss(
    a: Tensor, layer: str, eps: float, mask: Tensor | None, tally: Tally | None
) -> Tensor:
    """`a` itself; in backward it gets the gradient of the term as well.

    Nothing is kept for that but `a`, which the next layer keeps anyway.

    Without a tally it does not: that is for a forward pass recomputed by checkpointing, where the
    first one has noted the tally, and must save the same tensors.
    """
    if tally is not None:
        tally.has_gradient = True
    return _CountInLoss.apply(a, layer, eps, mask, tally)


class _CountInLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, layer: str, eps: float, mask: Tensor | None, tally: Tally | None
    ) -> Tensor:
        ctx.save_for_backward(a)
        ctx.layer, ctx.eps, ctx.mask, ctx.tally = layer, eps, mask, tally
        return a.view_as(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        if ctx.tally is not None:
            factor = ctx.tally.factor(ctx.layer).to(a.device)
            grad = add_slope(grad, a, ctx.eps, factor, ctx.mask)
        return grad, None, None, None, None
