"""Linear layers whose frozen weight is cast to the dtype of autocast once, not in each pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

COPY = "_cast"  # attribute


class _Copy(NamedTuple):
    state: tuple[int, int]
    weight: Tensor


class CastLinear(nn.Linear):
    """nn.Linear with a copy of its frozen weight; it replaces the class of a live nn.Linear.

    The layer itself computes as ever: kernels that are fused with it ask for the copy. What has
    changed a weight through `.data`, as merging does, leaves no trace in it, so that the copy is
    made anew after a change between training and evaluation, too.
    """

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [O, I] in a dtype: itself, or a copy that is kept if it is frozen."""
        weight = self.weight
        if weight.dtype == dtype or weight.requires_grad:
            return weight
        # the storage is another one after an assignment to `.data`
        state = (weight._version, weight.untyped_storage()._cdata)
        known = vars(self).get(COPY)
        if known is None or known.state != state or known.weight.dtype != dtype:
            known = _Copy(state, weight.detach().to(dtype))
            vars(self)[COPY] = known
        return known.weight

    def train(self, mode: bool = True) -> "CastLinear":
        """Set the mode; the copy is forgotten if it changes."""
        if mode != self.training:
            vars(self).pop(COPY, None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # of copies and files
        return {name: value for name, value in vars(self).items() if name != COPY}
