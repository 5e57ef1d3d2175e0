"""The density term of one training forward, and its gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petl.core.layers.context import add_gradient
from petl.methods.losses.density.counts import add_slope
from petl.ops import Ctx
from petl.system.collectives import summed


class Tally:
    """The counts of each layer in one forward pass.

    Layers may be called several times, or not at all; the term is the mean over the values of a
    layer and over the called layers of a stack. Backward passes read the counts, so they must run
    after the forward pass is complete.

    Args:
        stacks: by layer, its stack.
        weight: 0-d, the gradient of the loss with respect to the term.
    """

    def __init__(self, stacks: Mapping[str, str], weight: Tensor) -> None:
        self.stacks, self.weight = stacks, weight
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}
        self.has_gradient = False

    def add(self, layer: str, total: Tensor, count: Tensor | int) -> None:
        """Add `count` values of a layer, of which `total` (a smooth count) are active."""
        self.sums[layer] = self.sums[layer] + total if layer in self.sums else total
        # calls of one layer, such as experts, add up
        self.counts[layer] = self.counts.get(layer, 0) + count

    def count_compiled(self, a: Tensor, layer: str, eps: float, mask: Tensor | None) -> Tensor:
        """Return `a` after counting it with operations that torch.compile can fuse.

        Requires that each layer is called exactly once.
        """
        square = a.float().square()
        h = square / (square + eps)
        count: Tensor | int = h.numel()
        if mask is not None:
            weight = mask.float()[:, None]
            h = h.reshape(len(weight), -1) * weight
            count = weight.sum() * h.shape[1]
        total, layers = h.sum(), list(self.stacks.values()).count(self.stacks[layer])
        # the graph is used below only
        self.add(layer, total.detach(), count)
        self.has_gradient = self.has_gradient or a.requires_grad
        return add_gradient(a, total / (count * layers), self.weight)

    @torch.no_grad()
    def over_processes(self, scale: Tensor) -> None:
        """Sum counts and weights over all processes, which average their gradients.

        Args:
            scale: 0-d, the weight of this process's rows in the step. With 0 (rows that only fill
                up a batch) they do not count and get no gradient.
        """
        is_real, layers = (scale != 0).double(), list(self.stacks)
        parts = [
            torch.as_tensor(values.get(layer, 0)).to(is_real) * is_real
            for values in (self.sums, self.counts)
            for layer in layers
        ]
        # one reduction in float64: counts beyond 2^24 would be rounded in float32
        totals = summed(torch.stack([self.weight.to(is_real), *parts]))
        self.weight = (totals[0] * is_real).to(self.weight.dtype)
        sums, counts = totals[1:].float().split(len(layers))
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
        # d term / d sum = 1 / (values * layers)
        return self.weight / (divisor.to(self.weight) if isinstance(divisor, Tensor) else divisor)

    def _divisor(self, layer: str) -> Tensor | int:
        called = sum(self.stacks[other] == self.stacks[layer] for other in self.sums)
        return self.counts[layer] * called


def count_in_loss(
    a: Tensor, layer: str, eps: float, mask: Tensor | None, tally: Tally | None
) -> Tensor:
    """Return `a`; its backward pass adds the gradient of the term.

    It saves only `a` for backward, which the next layer saves anyway.

    Args:
        tally: None in a forward pass recomputed by checkpointing: it has to save the same tensors,
            but the gradient is added by the node of the first pass.
    """
    if tally is not None:
        tally.has_gradient = True
    return _CountInLoss.apply(a, layer, eps, mask, tally)


class _CountInLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx, a: Tensor, layer: str, eps: float, mask: Tensor | None, tally: Tally | None
    ) -> Tensor:
        ctx.save_for_backward(a)
        ctx.layer, ctx.eps, ctx.mask, ctx.tally = layer, eps, mask, tally
        # a new tensor, so that autograd calls this node's backward; no view: models may change it
        return a.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        if ctx.tally is not None:
            factor = ctx.tally.factor(ctx.layer).to(a.device)
            grad = add_slope(grad, a, ctx.eps, factor, ctx.mask)
        return grad, None, None, None, None
