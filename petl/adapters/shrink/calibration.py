"""One forward pass: the importance of the blocks, and the norms of what some layers read.

Shapes: T tokens, I inputs of a layer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.layers.context import ForwardContext, is_encoder_decoder
from petl.core.masks import without_padding
from petl.core.model.modes import checked_batches
from petl.errors import UnsupportedError
from petl.system import collectives as distributed
from petl.training.ranks import block_importance

Batches = Iterable[Mapping[str, object]]


class InputSums:
    """Sums over the tokens of what layers read, padding left out.

    Attributes:
        squares: of each layer, sums of squares [I] in float64, by path.
        means: of each layer, means [I], if asked for.
    """

    def __init__(
        self, model: nn.Module, before: Mapping[str, Sequence[str]], *, with_means: bool = False
    ) -> None:
        """Prepare the sums.

        Args:
            model: the dense model.
            before: the layers, by path; of each the layers that a forward pass calls before it.
            with_means: add up `means`, too.
        """
        self.model, self.before, self.with_means = model, before, with_means
        coder: Any = model.get_decoder() if is_encoder_decoder(model) else nn.Module()  # ty: ignore
        self.decoder = {*coder.modules()}
        self.masks = ForwardContext()
        self.running: dict[str, tuple[Tensor, Tensor]] = {}  # of this batch: squares, and sums
        self.called: set[str] = set()
        self.squares: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}

    def measure(self, batches: Batches, metric: str) -> dict[str, float]:
        """Run the model once over the batches; return the importance of its blocks.

        Raises:
            UnsupportedError: a layer is not called once a pass, after those before it.
            InputError: as of `petl.ranks.block_importance`.
        """
        # one pass for both: importance has hooks of its own
        first = {path for paths in self.before.values() for path in paths}
        module = self.model.get_submodule
        hooks = [
            *(module(p).register_forward_pre_hook(partial(self.note, p)) for p in first),
            *(module(p).register_forward_pre_hook(partial(self.add, p)) for p in self.before),
        ]
        try:
            importance = block_importance(self.model, self.each(batches), metric)
        finally:
            for hook in hooks:
                hook.remove()
        # a process may have no batch
        parts = [p for p in distributed.gathered((self.squares, self.means)) if p[0]]
        self.squares = {path: total(p[0][path] for p in parts) for path in self.before}
        if self.with_means:  # the last entry is the number of tokens
            sums = {path: total(p[1][path] for p in parts) for path in self.before}
            self.means = {path: own[:-1] / own[-1] for path, own in sums.items()}
        return importance

    def norms(self, path: str) -> Tensor:
        """Return the norms of the inputs of a layer over all tokens, [I] in float32."""
        return self.squares[path].sqrt().float()

    def each(self, batches: Batches) -> Iterator[Mapping[str, object]]:
        """Yield the batches; after the pass of each, add its sums."""
        for batch in checked_batches(batches):
            self.masks.read_masks(self.model, batch)
            yield batch
            for path in self.before:
                if path not in self.running:
                    raise UnsupportedError(
                        f"a forward pass does not call {path}, so its channels are not known; pass "
                        "inputs for the complete model"
                    )
                squares, sums = (tensor.cpu().double() for tensor in self.running[path])
                # in float64: the result does not depend on how rows are batched
                self.squares[path] = self.squares.get(path, 0) + squares
                self.means[path] = self.means.get(path, 0) + sums
            self.running.clear()
            self.called.clear()

    def note(self, path: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of a layer that is called before another."""
        self.called.add(path)

    def add(self, path: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of a layer: add up its input."""
        if path in self.running:  # its rows would be those of several blocks
            raise UnsupportedError(
                f"a forward pass calls {path} more than once: blocks share it, or rows are "
                "computed in parts, and it has no channels of one block; choose another model"
            )
        late = [each for each in self.before[path] if each not in self.called]
        if late:
            raise UnsupportedError(
                f"a forward pass calls {path} before {late[0]}, so the two are no MLP of a known "
                "form; choose another model"
            )
        mask = self.masks.decoder_mask if layer in self.decoder else self.masks.mask
        x_TI = without_padding(args[0], mask)
        # without a copy of x in float32
        norms = torch.linalg.vector_norm(x_TI, dim=0, dtype=torch.float32)
        sums = x_TI.sum(0, dtype=torch.float32) if self.with_means else norms[:0]
        count = norms.new_full((1,), len(x_TI))
        self.running[path] = norms.square(), torch.cat([sums, count])


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of some tensors, at least one."""
    return reduce(torch.add, tensors)
