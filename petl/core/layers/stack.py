"""Parameters of several adapters in one leaf: each adapter's parameter is a view of its slice.

Shapes: K adapters. A smaller parameter than the largest is filled up with zeros. It keeps memory of
its own, which is copied into the leaf before a pass, and gets its part of the gradient: the rest is
never read, so it takes no part in clipping or decay.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Stack:
    """One parameter of K adapters, [K, ...], as a leaf of the autograd graph.

    Attributes:
        leaf: the stacked values.
        parameters: those of the adapters, in the order of the slices.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        shape = [max(sizes) for sizes in zip(*(p.shape for p in parameters), strict=True)]
        first = parameters[0]
        self.leaf = first.new_zeros((len(parameters), *shape)).requires_grad_()
        # by slice: the part that the parameter fills
        self._parts = [tuple(slice(size) for size in p.shape) for p in parameters]
        self._apart: list[tuple[Tensor, Tensor]] = []
        for p, slot, part in zip(parameters, self.leaf.data, self._parts, strict=True):
            slot[part].copy_(p.data)
            if p.shape == slot.shape:
                # the same Parameter, as optimizers hold it; nobody else may set `.data`
                p.data = slot
            else:  # a view of a part would not be contiguous, as fused optimizers need it
                self._apart.append((slot[part], p))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the values of parameters that are no views into the leaf."""
        if self._apart:
            slots, own = zip(*self._apart, strict=True)
            torch._foreach_copy_(list(slots), [p.data for p in own])

    def hand_out(self) -> None:
        """Add each slice of the leaf's gradient to that of its parameter, and clear the leaf's."""
        # cleared, so that the gradients of two micro-batches are added in the parameters only
        grad, self.leaf.grad = self.leaf.grad, None
        if grad is None:
            return
        for p, slot, part in zip(self.parameters, grad.contiguous(), self._parts, strict=True):
            own = slot if p.shape == slot.shape else slot[part].contiguous()
            # a view, and safe to add to: the leaf no longer holds this gradient
            p.grad = own if p.grad is None else p.grad.add_(own)

    def release(self) -> None:
        """Give all parameters memory of their own again."""
        for p in self.parameters:
            p.data = p.data.clone()
