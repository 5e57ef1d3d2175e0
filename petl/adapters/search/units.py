"""Units of a model, each at one of several levels, and the context that puts levels into it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.adapters.search.evolve import check_state
from petl.errors import InputError, UnsupportedError

Levels = tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True)
class Unit:
    """A part of a model whose level is searched.

    Attributes:
        name: the path of its module in the base model.
        levels: their number.
        costs: of each level, not falling.
        tensors: of each level, the values of parameters, by name in the model.
        values: of each level, the setting that it stands for, such as a density.
        block: the module that is skipped at the levels whose value is "skip", or None.
    """

    name: str
    levels: int
    costs: tuple[float, ...]
    tensors: Levels
    values: tuple[Any, ...]
    block: nn.Module | None = None


class Feature(ABC):
    """A saved adapter on its base model, with units whose levels determine the size of its file.

    Attributes:
        file: name of the file that holds the weights.
        model: the adapter as it is, on its base model.
        units: as of `levels_of`.
        unit_bytes: bytes of the file for a cost of 1.
        fixed: bytes of the file for what no level changes: heads, names and shapes.
    """

    file: ClassVar[str] = "adapter_model.safetensors"
    unit_bytes: ClassVar[int] = 1

    model: PeftModel
    units: list[Unit]
    fixed: int

    def bytes_of(self, state: Sequence[int]) -> int:
        """Return the largest size of the file of a state."""
        pairs = zip(self.units, state, strict=True)
        costs = sum(unit.costs[level] for unit, level in pairs)
        return self.fixed + self.unit_bytes * int(costs)

    @abstractmethod
    def write(self, state: Sequence[int], folder: Path) -> None:
        """Write an adapter folder of a state; `folder` does not exist."""


@contextmanager
def swapped(model: nn.Module, units: Sequence[Unit]) -> Generator[Callable[[Sequence[int]], None]]:
    """Yield a function that puts the levels of a state into a model, in place.

    At the end of the block the model has its own tensors again, bit for bit. Only units whose level
    changes are written to.

    Raises:
        InputError: the model lacks a tensor of a unit, or has it in another shape.
    """
    live = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    names = {name for unit in units for level in unit.tensors for name in level}
    for unit in units:
        for name, tensor in unit.tensors[0].items():
            if name not in live or live[name].shape != tensor.shape:
                raise InputError(
                    f"the model has no tensor {name} of shape {list(tensor.shape)}: these levels "
                    "are those of another model"
                )
    original = {name: live[name].detach().clone() for name in names}
    loaded: list[int | None] = [None] * len(units)
    levels = [unit.levels for unit in units]

    with ExitStack() as stack:
        stack.callback(_write, live, original)
        skips = [
            stack.enter_context(skippable(unit.block)) if unit.block is not None else None
            for unit in units
        ]

        def to(state: Sequence[int]) -> None:
            check_state(state, levels, "state")
            for i, (unit, level) in enumerate(zip(units, state, strict=True)):
                if loaded[i] == level:
                    continue
                loaded[i] = None  # an interrupt may leave half of the tensors
                _write(live, unit.tensors[level])
                skip = skips[i]
                if skip is not None:
                    skip.on = unit.values[level] == "skip"
                loaded[i] = level

        yield to


@torch.no_grad()
def _write(live: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        live[name].copy_(tensor)


class SkipLayer:
    """The forward of a block that may return its input instead.

    Attributes:
        on: return the input.
    """

    def __init__(self, forward: Callable[..., object]) -> None:
        self.forward, self.on = forward, False
        # length of the tuple that the block returns, 0 for a tensor; unknown before the first call
        self.returned: int | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what the block returns, or its input in the same form.

        Raises:
            UnsupportedError: the block returns more than hidden states.
        """
        if self.on and self.returned is not None:
            if self.returned > 1:
                raise UnsupportedError(
                    f"a block that returns {self.returned} values cannot be skipped: the next ones "
                    "read more of it than hidden states, as those of T5 do"
                )
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self.returned else hidden
        found = self.forward(*args, **kwargs)
        # classes of transformers return either; a block computed once tells which
        self.returned = len(found) if isinstance(found, tuple) else 0
        return self(*args, **kwargs) if self.on else found


@contextmanager
def skippable(block: nn.Module) -> Generator[SkipLayer]:
    """Yield the switch of a block that can be skipped inside the `with` block."""
    attributes = block.__dict__
    # a forward of the instance, as accelerate's hooks set it
    before = attributes.get("forward")
    skip = SkipLayer(block.forward)
    attributes["forward"] = skip
    try:
        yield skip
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
