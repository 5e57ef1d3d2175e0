"""The codes of a whole adapter as one tensor, and their statistics as another.

Safetensors spends some 145 bytes on the name, type and place of each tensor, which on a small
adapter of one bit is a fifth of the file. Here a third tensor says which weights the others are of.
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
    """`codes` uint8 [all bytes], `stats` float32 [W, 2] and `layer_settings` uint8 [8], by name.

    `packed` has the codes, uint8 [bytes], and stats, float32 [2], of each of W weights; they are
    laid out in the order of their names.
    """
    names = sorted(packed)
    sizes = {name: packed[name][0].numel() for name in names}
    return {
        CODES: torch.cat([packed[name][0] for name in names]),
        STATS: torch.stack([packed[name][1] for name in names]),
        LAYOUT: layer_settings(sizes),
    }


def unstack(
    entries: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `stack` was given; `sizes` are the bytes of each weight's codes.

    Raises:
        InputError: the tensors are of other weights, or not all there.
    """
    lacking = [name for name in (CODES, STATS, LAYOUT) if name not in entries]
    if lacking:
        raise InputError(f"the adapter file lacks {lacking[0]}; it was truncated")
    names = sorted(sizes)
    total = sum(sizes.values())
    fits = entries[CODES].shape == (total,) and entries[STATS].shape == (len(names), 2)
    if not fits or not torch.equal(entries[LAYOUT].cpu(), layer_settings(sizes)):
        raise InputError(
            f"the adapter file holds {entries[CODES].numel()} bytes of codes of "
            f"{len(entries[STATS])} weights, and this model and config have {total} of "
            f"{len(names)}, such as {names[0]}; it was saved from another model or config"
        )
    pieces = entries[CODES].split([sizes[name] for name in names])
    return dict(zip(names, zip(pieces, entries[STATS].unbind(), strict=True), strict=True))


def layer_settings(sizes: Mapping[str, int]) -> Tensor:
    """Eight bytes, uint8 [8], that tell sets of names and sizes apart."""
    digest = hashlib.sha256(json.dumps(sorted(sizes.items())).encode()).digest()
    return torch.tensor(list(digest[:8]), dtype=torch.uint8, device="cpu")
