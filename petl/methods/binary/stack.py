"""The "stacked" file format: all codes of an adapter in one tensor, all statistics in another.

Safetensors takes some 145 bytes for the name, dtype and offsets of each tensor, which is a fifth of
the file of a small 1-bit adapter. A third tensor is a checksum of the names and sizes of the
weights, by which a file of another model or config is recognized.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from petl.errors import InputError

STACK = "base_model.model.petl_binary"
CODES, STATS, LAYOUT = f"{STACK}.codes", f"{STACK}.stats", f"{STACK}.layout"


def stack(packed: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Stack weights into codes, uint8 [all bytes], stats, float32 [W, 2], and layout, uint8 [8].

    Args:
        packed: for each of W weights by name, its codes, uint8 [bytes], and statistics, float32
            [2]; they are stacked in alphabetical order.
    """
    names = sorted(packed)  # the order is not saved
    sizes = {name: packed[name][0].numel() for name in names}
    return {
        CODES: torch.cat([packed[name][0] for name in names]),
        STATS: torch.stack([packed[name][1] for name in names]),
        LAYOUT: layout_digest(sizes),
    }


def unstack(
    entries: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Undo `stack`.

    Args:
        entries: the tensors of the file.
        sizes: for each weight by name, the bytes of its codes.

    Raises:
        InputError: a tensor is missing, or they were saved for other weights.
    """
    lacking = [name for name in (CODES, STATS, LAYOUT) if name not in entries]
    if lacking:
        raise InputError(f"the adapter file has no tensor {lacking[0]}; it is incomplete")
    names = sorted(sizes)
    total = sum(sizes.values())
    fits = entries[CODES].shape == (total,) and entries[STATS].shape == (len(names), 2)
    # sizes alone would not notice swapped weights
    if not fits or not torch.equal(entries[LAYOUT].cpu(), layout_digest(sizes)):
        raise InputError(
            f"the adapter file has {entries[CODES].numel()} bytes of codes for "
            f"{len(entries[STATS])} weights, but this model and config need {total} bytes for "
            f"{len(names)} weights, such as {names[0]}; it was saved from another model or config"
        )
    pieces = entries[CODES].split([sizes[name] for name in names])
    return dict(zip(names, zip(pieces, entries[STATS].unbind(), strict=True), strict=True))


def layout_digest(sizes: Mapping[str, int]) -> Tensor:
    """The first 8 bytes of a hash of the weights' names and sizes, uint8 [8]."""
    digest = hashlib.sha256(json.dumps(sorted(sizes.items())).encode()).digest()
    # 8 bytes: collisions are no concern, size is
    return torch.tensor(list(digest[:8]), dtype=torch.uint8, device="cpu")
