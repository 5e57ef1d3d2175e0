"""Masks of a file: checks of their bits."""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from petl.errors import InputError


def check_mask(name: str, packed: Tensor, entries: int, pruned: int | None = None) -> None:
    """Raise InputError unless a packed mask (petl/ops/masks.py) is one of this many entries.

    Args:
        name: of the mask, for the message.
        packed: uint8.
        entries: number of entries.
        pruned: number of those that are 0; None: any.
    """
    size = -(-entries // 8)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise InputError(
            f"{name} is {packed.dtype} {list(packed.shape)}; a mask of {entries} entries is "
            f"torch.uint8 [{size}]"
        )
    if packed.is_meta:
        return
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if bits[entries:].any():
        raise InputError(f"{name} has bits after its last of {entries} entries; they must be 0")
    found = entries - int(bits[:entries].sum())
    if pruned is not None and found != pruned:
        raise InputError(f"{name} prunes {found} of {entries} entries, and num_pruned is {pruned}")


# Numbers for adapters: a custom operator takes tensors and numbers only, and no modules


# weak: the registry must not keep deleted models alive
_ADAPTERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register_adapter(adapter: object) -> int:
    """Register an adapter, weakly referenced, and return its number."""
    number = next(_numbers)
    _ADAPTERS[number] = adapter
    return number


def adapter_of(number: int) -> Any:
    """Return the adapter with this number."""
    return _ADAPTERS[number]
