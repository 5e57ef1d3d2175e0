"""The stacks that a LoRA adapts, and the form in which PEFT keeps and saves their factors.

Of a module of experts, the stack that is adapted last is the outer one: its tensors are saved under
the module's own path, those of the other under `base_layer`. lora_A is [E R, I], with row e R + r,
and lora_B [O, R E], with column r E + e. Shapes: E experts, I in, O out, R rank.
"""

from collections.abc import Iterator
from typing import NamedTuple

from peft import PeftConfig
from torch import Tensor, nn

from petl.core.compat import BaseTunerLayer
from petl.core.experts.layout import ExpertsLayout, experts_of
from petl.core.spec.facts import facts_of


class Stack(NamedTuple):
    """A stack that an adapter adapts.

    Attributes:
        path: of the module of experts in the base model.
        name: of the parameter.
        module: of experts.
        depth: the number of layers of PEFT around that for this stack.
    """

    path: str
    name: str
    module: nn.Module
    depth: int

    @property
    def saved_path(self) -> str:
        """The path of its layer, under which PEFT saves it."""
        return self.path + ".base_layer" * self.depth


def has_sides_swapped(module: nn.Module, layout: ExpertsLayout) -> bool:
    """Return True where PEFT takes outputs for inputs: Llama 4 has no flag `is_transposed`."""
    return layout.transposed != getattr(module, "is_transposed", False)


def saved_factors(A: Tensor, B: Tensor, *, swapped: bool) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B, as they are saved, for A [E, R, I] and B [E, O, R].

    Args:
        A, B: the factors.
        swapped: as of `has_sides_swapped`.
    """
    if swapped:
        A, B = B.mT, A.mT
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def stacked_factors(A: Tensor, B: Tensor, experts: int, *, swapped: bool) -> tuple[Tensor, Tensor]:
    """Return the factors [E, R, I] and [E, O, R], views where possible; undoes `saved_factors`."""
    A_ERI = A.unflatten(0, (experts, -1))
    B_EOR = B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return (B_EOR.mT, A_ERI.mT) if swapped else (A_ERI, B_EOR)


def stacks_of(config: PeftConfig, model: nn.Module) -> Iterator[Stack]:
    """Yield the stacks that `config.target_parameters` targets in a base model, adapted or not."""
    given = facts_of(config).target_parameters or ()
    endings = tuple(f".{name}" for name in given)
    for inside, module in model.named_modules() if given else ():
        layout = None if isinstance(module, BaseTunerLayer) else experts_of(module)
        path = inside.replace(".base_layer", "")
        named = [s for s in layout.stacks if f".{path}.{s}".endswith(endings)] if layout else []
        for depth, name in zip(reversed(range(len(named))), named, strict=True):
            yield Stack(path, name, module, depth)
