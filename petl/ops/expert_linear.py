"""The linear layer of one expert, whose weight is a slice of a stack.

Methods are written for linear layers. A stack [E, O, I] is E of them, each seen through an object
of this class, which has no tensors of its own. Shapes: E experts, I in, O out.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class ExpertLinears(nn.Module):
    """The layers of the experts of a module: a child for each stack, with children "0", "1", ..."""

    def layers(self, name: str) -> list[nn.Module]:
        """Return the layers of a stack, adapted or not; empty if it has none."""
        return [*self.get_submodule(name).children()] if name in self._modules else []


class ExpertLinear(nn.Linear):
    """nn.Linear whose weight [O, I] and bias [O] are slices of parameters of a module of experts.

    A copy of this layer alone is an nn.Linear; a copy of the module of experts has its own.

    Args:
        owner: the module with the parameters.
        name: of the stack; its biases are `<name>_bias`.
        expert: index in the stack.
        transposed: the stack is [E, I, O].
        has_bias: the stack has biases.
    """

    def __init__(
        self, owner: nn.Module, name: str, expert: int, *, transposed: bool, has_bias: bool
    ) -> None:
        self._place(owner, name, expert, transposed, has_bias)
        self.out_features, self.in_features = self.weight.shape

    def _place(
        self, owner: nn.Module, name: str, expert: int, transposed: bool, has_bias: bool
    ) -> None:
        nn.Module.__init__(self)  # without the tensors of nn.Linear
        self.owner = (owner,)  # in a tuple, so that it is no child of this module
        self.name, self.expert = name, expert
        self.transposed, self.has_bias = transposed, has_bias

    def _slice(self, name: str) -> Tensor:
        # detached, so that it shares memory and version with the stack, and has no graph
        # not `get_parameter`: under FSDP1 the stack is a plain tensor
        return getattr(self.owner[0], name).detach()[self.expert]

    @property
    def weight(self) -> nn.Parameter:  # ty: ignore[incompatible-property-override]
        """The weight, [O, I]; writing into it writes into the stack."""
        stored = self._slice(self.name)
        return nn.Parameter(stored.t() if self.transposed else stored, requires_grad=False)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, [O], or None."""
        if not self.has_bias:
            return None
        return nn.Parameter(self._slice(f"{self.name}_bias"), requires_grad=False)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Write a weight [O, I] into the stack."""
        self.weight.copy_(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        if id(self.owner[0]) not in memo and is_part(memo):
            # it is reached before its owner, such as by what several layers share
            copy.deepcopy(self.owner[0], memo)
            if id(self) in memo:  # as a part of its owner
                return memo[id(self)]
        owner = memo.get(id(self.owner[0]))
        if owner is not None:
            copied = type(self).__new__(type(self))
            copied._place(owner, self.name, self.expert, self.transposed, self.has_bias)
            # the owner's copy has no tensors yet
            copied.out_features, copied.in_features = self.out_features, self.in_features
            return copied
        alone = nn.Linear(self.in_features, self.out_features, bias=self.has_bias, device="meta")
        alone.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        if self.bias is not None:
            alone.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return alone


def is_part(memo: dict[int, object]) -> bool:
    """Return True if what `copy.deepcopy` began with is more than a layer.

    Args:
        memo: of `copy.deepcopy`; its first module is the copy of what it began with.
    """
    first = next((copied for copied in memo.values() if isinstance(copied, nn.Module)), None)
    # a layer around another one has the latter under a name of PEFT
    return first is not None and not hasattr(type(first), "get_base_layer")
