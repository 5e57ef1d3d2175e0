"""Base class of adapters whose merged weight is not the base weight plus a matrix."""

from torch import Tensor

from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.spec.config import MethodConfig


class RewritingAdapter(Adapter):
    """An adapter that computes a new weight from the base weight, such as one with zeros.

    Attributes:
        unmerged: the base weight [O, I] while the adapter is merged, from which unmerging restores
            the original bits; else None.
    """

    def __init__(self, shape: LayerShape, config: MethodConfig, info: LayerInfo) -> None:
        super().__init__(shape, config, info)
        self.unmerged: Tensor | None = None

    def new_weight(self, weight: Tensor) -> Tensor:
        """Return a new tensor: the weight that the layer computes with, from that of the base.

        Args:
            weight: [O, I]; the result has its dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no new_weight")

    def change_of(self, weight: Tensor) -> Tensor:
        if self.unmerged is not None:
            weight = self.unmerged.to(weight)  # it does not move with the model
        return self.new_weight(weight) - weight

    def merge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """Return the new weight, in the layout of the given one."""
        # its memory stays: PEFT puts the merged weight in another place
        self.unmerged = weight.t() if transposed else weight
        merged = self.new_weight(self.unmerged)
        return merged.t().contiguous() if transposed else merged

    def unmerge(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """Return the original weight, bit-exact unless the model was cast meanwhile."""
        original, self.unmerged = self.unmerged, None
        assert original is not None
        original = original.to(weight)  # it does not move with the model
        return original.t() if transposed else original
