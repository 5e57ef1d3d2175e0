"""Which rows of an activation are tokens, and which are padding."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petl.errors import InputError

Masks = dict[str, Tensor | None]


@contextmanager
def inputs_of(model: nn.Module) -> Generator[dict[str, Any]]:
    """For the time of a block, the inputs by name of the model's last forward pass.

    A base model is given more tokens than the batch has where a method puts some in front.
    """
    inputs: dict[str, Any] = {}

    def look(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        inputs.clear()
        inputs.update(kwargs)

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


def token_masks(inputs: Mapping[str, Any], is_encoder_decoder: bool) -> Masks:
    """By stack, the mask [B, T] of a forward pass with these inputs; None: all are tokens.

    A decoder without a mask of its own has tokens where there are labels.

    Raises:
        InputError: a mask of another form.
    """
    masks = {"encoder" if is_encoder_decoder else "": inputs.get("attention_mask")}
    if is_encoder_decoder:
        labels, given = inputs.get("labels"), inputs.get("decoder_attention_mask")
        masks["decoder"] = labels.ne(-100) if given is None and labels is not None else given
    for mask in masks.values():
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise InputError(
                f"mask_padding needs attention masks [batch, tokens], not {list(mask.shape)}; "
                "pass those, or mask_padding=False"
            )
    return masks


def rows_of(mask: Tensor | None, a: Tensor) -> Tensor | None:
    """The mask [B, T] for the rows of a [B, T, F] or [B T, F], flat; None: all are tokens.

    A mask may begin with tokens that are no input, such as a prefix.

    Raises:
        InputError: the rows are others, such as those gathered for an expert.
    """
    if mask is None:
        return None
    if a.dim() == 3 and len(a) == len(mask) and a.shape[1] <= mask.shape[1]:
        return mask[:, mask.shape[1] - a.shape[1] :].reshape(-1)
    if a.dim() == 2 and len(a) == mask.numel():
        return mask.reshape(-1)
    raise InputError(
        f"mask_padding cannot tell the tokens in activations {list(a.shape)} by an attention mask "
        f"{list(mask.shape)}; pass mask_padding=False"
    )


def share_active(a: Tensor, threshold: float, rows: Tensor | None) -> Tensor:
    """The share of values with `|a| > threshold`, of each sample [B]; of each row, if a is [N, F].

    Rows that are no tokens are left out; a sample without any counts as 0.
    """
    active = (a.abs() > threshold).sum(-1, dtype=torch.float32) / a.shape[-1]
    if a.dim() == 2:
        return active if rows is None else active[rows.bool()]
    if rows is None:
        return active.flatten(1).mean(1)
    weight = rows.view(active.shape).to(active)
    return (active * weight).sum(1) / weight.sum(1).clamp(min=1)
