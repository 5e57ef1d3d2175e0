"""Mixed batches, in which each row has an adapter of its own.

Shapes: N rows, T tokens of each, I in, O out, R rank.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl.ops.low_rank import RowFactors, stack_rows

FEW = 12  # tokens for each adapter of a mixed batch, up to which its rows are best computed at once
FactorsOf = Callable[[str], Any]  # by name: A [R, I], B [O, R] and the scale, or None


class Rows(list[str]):
    """The adapters of a batch's rows during one call of the model.

    A call that generates runs each layer once a token. What a layer has put together for its rows
    is kept here from its second turn on, so that a single turn takes no memory for longer.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._kept: dict[nn.Module, RowFactors | None] = {}

    def stacked(
        self, layer: nn.Module, dtype: torch.dtype, made: Callable[[], RowFactors | None]
    ) -> RowFactors | None:
        """What `made` makes of the rows for this layer, or made of them before."""
        kept = self._kept.get(layer)
        if kept is not None and kept.A.dtype == dtype:
            return kept
        found = made()
        self._kept[layer] = found if layer in self._kept else None
        return found


def row_factors(
    layer: nn.Module, x: Tensor, names: Sequence[str], here: Collection[str], of: FactorsOf
) -> RowFactors | None:
    """The updates of all rows of a layer together, for two batched products.

    Args:
        x: the layer's input, [N, T, I].
        names: of the rows.
        here: those names of which the layer has an adapter; rows of others get no update.
        of: the factors of an adapter of the layer, None if it is no plain product of such.

    Returns:
        None where each adapter is best computed with its own rows: they have many tokens, need
        gradients, or ranks or forms that differ.
    """
    if x.dim() != 3 or len(x) * x.shape[1] > FEW * len(here) or torch.is_grad_enabled():
        return None

    def made() -> RowFactors | None:
        factors = {name: of(name) for name in here}
        ranks = {None if found is None else len(found[0]) for found in factors.values()}
        if len(ranks) != 1 or None in ranks:
            return None
        return stack_rows([factors.get(name) for name in names], x.dtype)

    return names.stacked(layer, x.dtype, made) if isinstance(names, Rows) else made()
