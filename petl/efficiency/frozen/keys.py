"""Which row is it: keys of the rows of a batch, from the arguments of a model's body.

A key is a digest of all that the frozen blocks read of a row: token ids, types and positions up to
the row's length, or the pixels or samples. Padding is left out, so that a row has one key in
batches of any width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor, nn

from petl.core.layers.context import arguments_of_forward

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
TEXT = (IDS, MASK, "token_type_ids", POSITIONS)
MEDIA = ("pixel_values", "input_values", "input_features")
# arguments that the blocks do not read
# a name that is missing here costs a pass of all blocks: a wrong hit would be worse
HARMLESS = {
    *("return_dict", "num_items_in_batch", "labels", "shift_labels", "logits_to_keep"),
}
KEY_BYTES = 16  # of 1e9 rows, two share a digest with a probability of about 1e-21


@dataclass(frozen=True)
class KeyedRows:
    """The rows of a batch.

    Attributes:
        keys: of the rows, 16 bytes each; [] if they cannot be told.
        lengths: tokens of each row; None for images and audio.
        width: tokens of the padded rows, or the size of an image or clip.
        reason: why there are no keys.
    """

    keys: list[bytes]
    lengths: list[int] | None = None
    width: tuple[int, ...] = ()
    reason: str = ""


def arguments_of(
    body: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """Return the arguments of a call of `body` by name, those of **kwargs included."""
    return {**dict(zip(arguments_of_forward(type(body)), args, strict=False)), **kwargs}


def rows_of(arguments: Mapping[str, object], *, packs: bool = False) -> KeyedRows:
    """Return the rows of a call of a model's body.

    Args:
        arguments: of the call, by name.
        packs: positions that count up over a whole row say no more than none: a row is packed in
            some batches with others that hold several texts, and then it has them.
    """
    inputs: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if value is None or value is False or name in HARMLESS:
            continue
        if name not in (*TEXT, *MEDIA) or not isinstance(value, Tensor):
            return KeyedRows([], reason=f"{name} is given")
        inputs[name] = value
    return _of_text(inputs, packs) if IDS in inputs else _of_media(inputs)


def _of_media(inputs: dict[str, Tensor]) -> KeyedRows:
    given = [value for name, value in inputs.items() if name in MEDIA]
    if len(given) != 1:
        return KeyedRows([], reason="it has neither token ids nor one image or clip for each row")
    # all of a row, its padding included: samples are convolved with those after them
    parts = {name: _bytes_of(value) for name, value in sorted(inputs.items())}
    keys = [_digest((name, rows[i]) for name, rows in parts.items()) for i in range(len(given[0]))]
    return KeyedRows(keys, None, tuple(given[0].shape[1:]))


def _of_text(inputs: dict[str, Tensor], packs: bool) -> KeyedRows:
    rows, width = inputs[IDS].shape
    if any(value.dim() != 2 or value.shape[1] != width for value in inputs.values()):
        return KeyedRows([], reason="a mask or other input is not of the form [rows, tokens]")
    lengths = np.full(rows, width)
    if MASK in inputs:
        mask = inputs.pop(MASK).cpu().numpy() != 0
        lengths = mask.sum(1)
        # left padding shifts absolute positions with the batch's width: a row has no one output
        if not np.array_equal(mask, np.arange(width) < lengths[:, None]):
            return KeyedRows([], reason="rows are padded on the left")
    arrays = {
        # positions may be given once for all rows
        name: value.expand(rows, width).cpu().numpy()
        for name, value in sorted(inputs.items())
    }
    whole, keys = np.arange(width), []
    for row, length in enumerate(lengths.tolist()):
        parts = {name: array[row, :length] for name, array in arrays.items()}
        if packs and POSITIONS in parts and np.array_equal(parts[POSITIONS], whole[:length]):
            del parts[POSITIONS]
        # one integer type: collators differ in theirs
        keys.append(_digest((name, part.astype("<i8").tobytes()) for name, part in parts.items()))
    return KeyedRows(keys, lengths.tolist(), (width,))


def _bytes_of(value: Tensor) -> list[bytes]:
    header = f"{value.dtype} {tuple(value.shape[1:])}".encode()
    flat = value.detach().cpu().contiguous().reshape(len(value), -1).view(torch.uint8).numpy()
    return [header + row.tobytes() for row in flat]


def _digest(parts: Iterable[tuple[str, bytes]]) -> bytes:
    hasher = blake2b(digest_size=KEY_BYTES)
    for name, content in parts:
        # with the length, so that no other division into parts gives the same bytes
        hasher.update(f"{name} {len(content)} ".encode() + content)
    return hasher.digest()
