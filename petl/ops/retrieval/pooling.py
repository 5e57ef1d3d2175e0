"""From the states of tokens to one vector for each text. B texts, T tokens, D numbers."""

import torch
from torch import Tensor

from petl.errors import InputError

POOLINGS = ("mean", "cls", "last")


def pool(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """Return a vector for each text, [B, D], whichever side of the texts is padded.

    Args:
        states: [B, T, D].
        mask: 1 for the tokens of a text and 0 for padding, [B, T].
        how: `mean` of the tokens, `cls`: the first, or `last`. Means of half precision are summed
            in float32.

    Raises:
        InputError: another pooling.
    """
    if how not in POOLINGS:
        raise InputError(f"pooling={how!r} is none of {', '.join(POOLINGS)}")
    if how == "mean":
        wide = torch.promote_types(states.dtype, torch.float32)
        weights = mask.to(wide)[..., None]
        mean = (states * weights).sum(1, dtype=wide) / weights.sum(1).clamp(min=1e-9)
        return mean.to(states.dtype)
    real = mask.to(torch.int32)  # not int64: ONNX's argmax
    first = real.argmax(1) if how == "cls" else real.shape[1] - 1 - real.flip(1).argmax(1)
    return states.gather(1, first[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)
