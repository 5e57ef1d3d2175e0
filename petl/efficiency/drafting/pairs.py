"""What drafting knows of encoder-decoders: which are verified, and the inputs of their passes.

A pass is one of the decoder, behind the encoder's outputs, which are computed once. Shapes: S
tokens of the encoder's input, H width.
"""

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from petl.core.parameters import max_positions
from petl.errors import InputError, shown

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
GivenIds = Tensor | Sequence[int]  # of one row
ModelInputs = dict[str, Any]  # further inputs of the model by name, and its cache
# types of models; tests run `verify` on each of them and compare its answers
VERIFIED = ("bart", "marian", "mbart", "mt5", "pegasus", "t5", "whisper")
_told: WeakSet[nn.Module] = WeakSet()  # models of two vocabularies


def why_unverified(model: PreTrainedModel) -> str:
    """Return why an encoder-decoder is decoded plainly; "" if it is not, or is a decoder."""
    if not model.config.is_encoder_decoder or model.config.model_type in VERIFIED:
        return ""
    return (
        f"{type(model).__name__} is an encoder-decoder of a kind on which petl.drafting.verify was "
        f"not run; it was on {', '.join(VERIFIED)}"
    )


def ids_argument(model: PreTrainedModel) -> str:
    """Return the name of a model's argument for the tokens of a pass."""
    return "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model can write."""
    # not the tokenizer's number: heads are often filled up to a round number of rows
    config = model.config.get_text_config()
    return _fact(config, "decoder_vocab_size") or config.vocab_size


def decoder_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions for tokens that a model writes; None if there is no limit."""
    # Whisper has one number for each stack
    return _fact(model.config, "max_target_positions") or max_positions(model)


def _fact(config: PretrainedConfig, name: str) -> Any:
    """Return what some kinds of configs say; None of others."""
    return getattr(config, name, None)


def sample_inputs(model: PreTrainedModel, length: int) -> ModelInputs:
    """Return what a pass needs besides tokens and cache: random encoder outputs, [1, S, H].

    Args:
        model: of which a decoder needs nothing.
        length: S.
    """
    if not model.config.is_encoder_decoder:
        return {}
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, length, model.config.hidden_size, generator=generator)
    return {"encoder_outputs": BaseModelOutput(states.to(model.device, model.dtype))}


def encoder_ids(
    model: PreTrainedModel, given: GivenIds | None, inputs: Tensor | None, mask: Tensor | None
) -> list[int] | None:
    """Return the tokens that an encoder has read, without padding; None if it has read no tokens.

    They are none, with one warning, if one is outside the decoder's vocabulary, or the encoder has
    another one.

    Args:
        model: an encoder-decoder.
        given: `encoder_input_ids`, [1, S] or a list.
        inputs: of the encoder, as `generate` hands them on; taken where none are given.
        mask: 0 at padding, [1, S].

    Raises:
        InputError: those that are given are no integers of one row.
    """
    size = vocabulary_size(model)
    tensor = inputs if given is None else _one_row(given, size)
    # embeddings and sound are no ids
    if tensor is None or tensor.is_floating_point() or tensor.dim() != 2:
        return None
    # -100 stands for those that `encoder_outputs` do not have
    if given is None and tensor.numel() and (tensor < 0).all():
        return None
    is_text = torch.ones_like(tensor) if mask is None or mask.shape != tensor.shape else mask
    ids = tensor[is_text.bool().to(tensor.device)].tolist()
    # Marian says so; its ids of both kinds may be below the size of either
    has_two = _fact(model.config, "share_encoder_decoder_embeddings") is False
    if not has_two and all(0 <= token < size for token in ids):
        return ids
    if model not in _told:
        warnings.warn(
            f"the input of {type(model).__name__} is not copied: its tokens are not those of the "
            f"decoder's vocabulary of {size}",
            stacklevel=2,
        )
        _told.add(model)
    return []


def _one_row(given: GivenIds, size: int) -> Tensor:
    """Return the integers of one row, [1, S]; raise InputError for anything else.

    Args:
        size: of the vocabulary; those of a list that are outside may become others outside.
    """
    if isinstance(given, Tensor):
        if given.dim() == 2 and len(given) == 1 and given.dtype in INTEGERS:
            return given
        found = f"{given.dtype} {list(given.shape)}"
    else:
        if isinstance(given, list | tuple) and all(type(token) is int for token in given):
            # a tensor holds no larger ones
            near = [min(max(token, -1), size) for token in given]
            return torch.tensor([near], dtype=torch.long)
        found = shown(given)
    raise InputError(
        f"encoder_input_ids are {found}: give the integers of the row that is decoded, [1, S] or "
        "a list"
    )
