"""Adapters of one form as one, whose tensors are theirs side by side.

Shapes: G groups of rows, each with an adapter of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def stacked(adapters: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """An adapter like these for inference, which computes [G, T, ...], group g by `adapters[g]`.

    Its tensors, and those of its pool, are [G, ...] and in `dtype` (None: as they are); one that
    was a vector [W] is [G, 1, W]. So what it computes with them has to let G be there. The adapters
    may be there several times.

    Returns:
        None if their tensors differ in shape or name.
    """
    first = adapters[0]
    found = {adapter: adapter.tensors() for adapter in adapters}
    forms = [{name: tensor.shape for name, tensor in own.items()} for own in found.values()]
    if any(form != forms[0] for form in forms):
        return None
    batched: dict[str, Any] = {
        name: _stack([found[adapter][name] for adapter in adapters], dtype) for name in forms[0]
    }
    own = {name: value for name, value in batched.items() if "." not in name}
    pooled = {name.partition(".")[2]: t for name, t in batched.items() if "." in name}
    kind = vars(type(first)).get("original", type(first))  # quantised ones name what they were
    alike = kind.__new__(kind)
    vars(alike).update(vars(first), _parameters={}, _buffers=own)
    vars(alike)["info"] = replace(first.info, shared=SimpleNamespace(**pooled) if pooled else None)
    return alike


def _stack(tensors: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    batched = torch.stack(tensors)
    if dtype is not None and batched.is_floating_point():
        batched = batched.to(dtype)
    return batched.unsqueeze(1) if batched.dim() == 2 else batched
