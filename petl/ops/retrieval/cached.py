"""Gradients of a loss over a large batch in the memory of a small one (GradCache).

Gao, Zhang, Han, Callan (2021), arXiv:2101.06983. The vectors are computed without a graph, the
loss gives its gradient at the vectors, and a second pass takes it back through the model, slice by
slice, with the random numbers of the first.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from petl.system.random_states import restore, states

Column = Mapping[str, Tensor]


def cached_step(
    encode: Callable[[Column], Tensor],
    columns: Sequence[Column],
    loss: Callable[..., Tensor],
    *,
    rows: int,
) -> float:
    """Add the gradients of a loss over all rows to the parameters; return the loss.

    Args:
        encode: from a slice of a column to vectors.
        columns: such as queries and documents: tensors by name, [B, ...] each.
        loss: of the vectors of all columns, [B, D] each.
        rows: of a slice.
    """
    slices = [sliced(column, rows) for column in columns]
    device = next(iter(columns[0].values())).device
    before, columns_of_vectors = [], []
    with torch.no_grad():
        for parts in slices:
            found = []
            for part in parts:
                before.append(states(device))
                found.append(encode(part))
            columns_of_vectors.append(torch.cat(found).requires_grad_())
    value = loss(*columns_of_vectors)
    after = states(device)
    gradients = torch.autograd.grad(value, columns_of_vectors, allow_unused=True)
    replay = iter(before)
    for parts, gradient in zip(slices, gradients, strict=True):
        for number, part in enumerate(parts):
            state = next(replay)
            if gradient is None:  # the loss does not use this column
                continue
            restore(state, device)
            own = gradient[number * rows : (number + 1) * rows]
            (encode(part) * own).sum().backward()
    restore(after, device)
    return value.item()


def sliced(column: Column, rows: int) -> list[Column]:
    """A column in parts of so many rows."""
    count = len(next(iter(column.values())))
    return [
        {name: tensor[start : start + rows] for name, tensor in column.items()}
        for start in range(0, count, rows)
    ]
