"""Stack the tensors of several adapters into one adapter that computes all of them together.

Shapes: G groups of rows, each with an adapter of its own, T tokens, W width.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def stacked(adapters: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """Return an adapter for inference on [G, T, ...] that computes group g by `adapters[g]`.

    Its tensors, and those of its pool, are [G, ...]; vectors [W] become [G, 1, W]. So the method's
    computation has to broadcast over the leading G.

    Args:
        adapters: of one class, with equal settings; an adapter may occur several times.
        dtype: of the stacked tensors; None: unchanged.

    Returns:
        The adapter, or None if their tensors differ in shape or name.
    """
    first = adapters[0]
    tensors = {adapter: adapter.tensors() for adapter in adapters}
    shapes = [{name: tensor.shape for name, tensor in own.items()} for own in tensors.values()]
    if any(other != shapes[0] for other in shapes):
        return None
    batched: dict[str, Any] = {
        name: _stack([tensors[adapter][name] for adapter in adapters], dtype) for name in shapes[0]
    }
    own = {name: value for name, value in batched.items() if "." not in name}
    pooled = {name.partition(".")[2]: t for name, t in batched.items() if "." in name}
    # quantized adapters have a swapped class, which would quantize the stacked tensors again
    cls = vars(type(first)).get("original", type(first))
    # no `__init__`, which would create parameters: the first adapter's attributes, new tensors
    stacked_adapter = cls.__new__(cls)
    vars(stacked_adapter).update(vars(first), _parameters={}, _buffers=own)
    shared = SimpleNamespace(**pooled) if pooled else None
    vars(stacked_adapter)["info"] = replace(first.info, shared=shared)
    return stacked_adapter


def _stack(tensors: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    batched = torch.stack(tensors)
    if dtype is not None and batched.is_floating_point():
        batched = batched.to(dtype)
    return batched.unsqueeze(1) if batched.dim() == 2 else batched
