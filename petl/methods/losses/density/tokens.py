"""Padding masks for the rows of activations."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from petl.core.masks import NAMES, tokens_of
from petl.core.types import Arguments
from petl.errors import InputError

Masks = dict[str, Tensor | None]


@contextmanager
def inputs_of(model: nn.Module) -> Generator[Arguments]:
    """Context that yields a dict with the inputs of the model's last forward pass, by name.

    A base model's inputs differ from the batch where a method prepends virtual tokens.
    """
    inputs: Arguments = {}

    def store(module: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
        inputs.clear()
        inputs.update(kwargs)

    handle = model.register_forward_pre_hook(store, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


def token_masks(inputs: Mapping[str, object], is_encoder_decoder: bool) -> Masks:
    """The mask [B, T] of each stack for a forward pass with these inputs; None if there is none.

    Without a decoder mask, the tokens of a decoder are those with labels.

    Raises:
        InputError: a mask has another number of dimensions.
    """
    for mask in (inputs.get(name) for name in NAMES):
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise InputError(
                f"mask_padding needs attention masks [batch, tokens], not {list(mask.shape)}; "
                "pass those, or mask_padding=False"
            )
    tokens = tokens_of(inputs, has_decoder=is_encoder_decoder)
    # "" is the only stack
    if not is_encoder_decoder:
        return {"": tokens.mask}
    return {"encoder": tokens.mask, "decoder": tokens.decoder}


def rows_of(mask: Tensor | None, a: Tensor) -> Tensor | None:
    """The mask [B, T], flattened to the rows of a [B, T, F] or [B T, F]; None if there is none.

    A mask may be longer at its beginning, by a prefix of virtual tokens.

    Raises:
        InputError: the shapes do not match, as for rows gathered for an expert.
    """
    if mask is None:
        return None
    # [B, T, F]: drop the mask of a prefix
    if a.dim() == 3 and len(a) == len(mask) and a.shape[1] <= mask.shape[1]:
        return mask[:, mask.shape[1] - a.shape[1] :].reshape(-1)
    # [B T, F], as some models flatten tokens
    if a.dim() == 2 and len(a) == mask.numel():
        return mask.reshape(-1)
    raise InputError(
        f"mask_padding cannot match activations {list(a.shape)} with an attention mask "
        f"{list(mask.shape)}; pass mask_padding=False"
    )


def active_fraction(a: Tensor, threshold: float, rows: Tensor | None) -> Tensor:
    """Fraction of values with `|a| > threshold` per example [B]; per row if a is [N, F].

    Padding is left out; an example without tokens counts as 0.
    """
    active = (a.abs() > threshold).sum(-1, dtype=torch.float32) / a.shape[-1]
    if a.dim() == 2:
        return active if rows is None else active[rows.bool()]
    if rows is None:
        return active.flatten(1).mean(1)
    # 1 for tokens, 0 for padding
    weight = rows.view(active.shape).to(active)
    return (active * weight).sum(1) / weight.sum(1).clamp(min=1)
