"""Which tokens of a batch are real, read in one way: masks, positions, values without padding.

Shapes: B rows, T tokens, D width.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from petl.ops import IGNORED

# arguments of models and blocks that hold a cache
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")
NAMES = ("attention_mask", "decoder_attention_mask")


class Tokens(NamedTuple):
    """The real tokens of the inputs of a model; None: no mask tells.

    Attributes:
        mask: of the only stack, or of an encoder, [B, T].
        decoder: of the decoder behind an encoder, [B, T].
    """

    mask: Tensor | None
    decoder: Tensor | None


def as_2d(mask: object) -> Tensor | None:
    """Return `mask` if it is a 2-D tensor, else None (4-D masks and block masks are not used)."""
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def tokens_of(inputs: Mapping[str, object], *, has_decoder: bool) -> Tokens:
    """Return the real tokens of inputs of a model, by name.

    Args:
        has_decoder: of an encoder-decoder; without a mask of its own, the decoder's padding is
            where labels are ignored.
    """
    mask, decoder = (as_2d(inputs.get(name)) for name in NAMES)
    if decoder is None and has_decoder:
        labels = as_2d(inputs.get("labels"))
        decoder = None if labels is None else labels.ne(IGNORED)
    return Tokens(mask, decoder)


def positions_in(mask: Tensor) -> Tensor:
    """Return the number of each token in its row, [B, T], counted without the padding before it."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def without_padding(x: Tensor, mask: object) -> Tensor:
    """Return values [..., D] as [tokens, D], without padding if the mask has one entry for each."""
    rows, known = x.reshape(-1, x.shape[-1]), as_2d(mask)
    if known is None or known.numel() != len(rows):
        return rows
    return rows[known.flatten().to(x.device) != 0]
