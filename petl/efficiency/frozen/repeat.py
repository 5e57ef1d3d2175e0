"""Blocks below the first adapter run once where a batch passes a model with and without adapters.

The first pass keeps the input of the first block and the output of the last one below the lowest
adapter. The second pass takes them if its first block gets the same input, to the bit, and computes
everything else. The tree of modules does not change: the class of each of these blocks is swapped.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from petl.core.layers.class_swap import SwappedClass, restore_class, swap_class
from petl.efficiency.frozen.prefix import find_prefix
from petl.errors import UnsupportedError


class RepeatedBlock(SwappedClass):
    """Mixin for the class of a block below the first adapter.

    Attributes:
        petl_repeated: the passes of the model.
    """

    computes_as_before = True
    petl_repeated: "RepeatedPasses"

    # not `forward`: checkpointing of transformers and torch's hooks act in `__call__`
    def __call__(self: Any, *args: object, **kwargs: object) -> object:
        given = args[0] if args else kwargs["hidden_states"]
        return self.petl_repeated.block(
            self, given, lambda: super(RepeatedBlock, self).__call__(*args, **kwargs)
        )


class RepeatedPasses:
    """Two passes of a model over each batch, of which the second one runs fewer blocks.

    Attributes:
        blocks: below the first adapter, in order.
        skipped: passes that did not run them.
    """

    def __init__(self, blocks: tuple[nn.Module, ...] = ()) -> None:
        self.blocks, self.skipped = blocks, 0
        self._first: Tensor | None = None
        self._last: object = None
        self._is_second = self._skips = False

    @contextmanager
    def second(self) -> Generator[None]:
        """Inside the block, a pass is the second one over the batch of the pass before it."""
        self._is_second = True
        try:
            yield
        finally:
            self._is_second = self._skips = False

    def block(self, block: nn.Module, given: Tensor, run: Callable[[], object]) -> object:
        """Return the output of a block, which runs unless its output is known."""
        is_first, is_last = block is self.blocks[0], block is self.blocks[-1]
        if not self._is_second:
            output = run()
            self._first = given if is_first else self._first
            self._last = output if is_last else self._last
            return output
        # virtual tokens, or an embedding with an adapter, give another input
        if is_first:
            self._skips = self._first is not None and torch.equal(given, self._first)
            self.skipped += self._skips
        if not self._skips:
            return run()
        # what lies between the first input and the last output is read by nobody
        return self._last


@contextmanager
def repeated_passes(model: nn.Module) -> Generator[RepeatedPasses]:
    """Let a model, inside the block, run its blocks below the first adapter once a batch."""
    passes = RepeatedPasses(_below(model))
    # not setattr, which a module would check for parameters
    for block in passes.blocks:
        block.__dict__["petl_repeated"] = passes
        swap_class(block, RepeatedBlock)
    try:
        yield passes
    finally:
        for block in passes.blocks:
            restore_class(block, RepeatedBlock)


def _below(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the blocks that compute the same with and without the adapters of a model."""
    # virtual tokens and their keys act on blocks in which there is no adapter
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return ()
    try:
        return find_prefix(model).own
    except UnsupportedError:
        return ()
