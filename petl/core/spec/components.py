"""Where the tensors of an adapter have its components, in order, and the first k of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

SCALES = ("full", "width")  # of a smaller width: that of the whole, or of a run of its own


@dataclass(frozen=True)
class Components:
    """Where a tensor has the components of an adapter of width W.

    Attributes:
        dim: the dimension along which they stand.
        blocks: equal parts of it, each with components in order; None: each part has all W.
        shared: the dimension has W / shared places, where it has no blocks with all components.
    """

    dim: int
    blocks: int | None = 1
    shared: int = 1

    def width(self, size: int) -> int:
        """Return W, of a tensor with this size of the dimension; not where `blocks` is None."""
        return size * self.shared

    @property
    def step(self) -> int:
        """What k must be a multiple of."""
        return math.lcm(self.shared, self.blocks or 1)

    def cut(self, tensor: Tensor, width: int, k: int) -> Tensor:
        """Return the part of a tensor of width `width` with the first `k` components.

        A view, unless there are several blocks.
        """
        dim = self.dim % tensor.dim()
        size = tensor.shape[dim]
        kept, blocks = size * k // width, size // width if self.blocks is None else self.blocks
        if blocks == 1:
            return tensor.narrow(dim, 0, kept)
        parts = tensor.unflatten(dim, (blocks, size // blocks))
        return parts.narrow(dim + 1, 0, kept // blocks).flatten(dim, dim + 1)


# by name of a tensor of a layer; a text: why there is no order
Ordered = Mapping[str, Components] | str
