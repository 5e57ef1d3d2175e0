"""How checkpoints call the weights of a model: projections of single experts, and linear layers.

Shapes: E experts, O outputs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from petl.core.experts.layout import experts_of


class ExpertProjection(NamedTuple):
    """A projection of one expert: its path in checkpoints, and the outputs that are its own."""

    path: str
    expert: int
    outputs: Tensor


def parts_of(
    model: PreTrainedModel, path: str, module: nn.Module, name: str
) -> Iterator[ExpertProjection]:
    """Yield the projections of each expert of a stack as checkpoints have them; else nothing.

    Which rows they are is told by transformers' own conversion, of a stack of row numbers.

    Args:
        model: without adapters, or with.
        path: of the module of experts in it.
        module: of experts.
        name: of the stack.
    """
    layout = experts_of(module)
    assert layout is not None
    experts, _, outputs = layout.shape(module, name)
    # no conversion of transformers splits these
    if layout.transposed:
        return
    # float32 would lose numbers above 2^24
    numbers = torch.arange(experts * outputs).view(experts, outputs, 1)
    for key, rows in revert_weight_conversion(model, {f"{path}.{name}": numbers}).items():
        # still a stack, whatever its name
        if rows.dim() != 2 or rows.shape[1] != 1:
            return
        first = int(rows[0]) // outputs
        yield ExpertProjection(key.removesuffix(".weight"), first, rows[:, 0] % outputs)


def path_in_checkpoints(model: PreTrainedModel, path: str) -> str:
    """Return the path of a linear layer in checkpoints, such as with another name of its list."""
    name = f"{path}.weight"
    found = revert_weight_conversion(model, {name: torch.empty(1, 1, device="meta")})
    return next(iter(found)).removesuffix(".weight") if len(found) == 1 else path
