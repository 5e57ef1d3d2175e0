"""The layers of a decoder with rotary positions, whose attention may compute some tokens."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from petl.core.layers.class_swap import original_class
from petl.core.model.structure import blocks
from petl.errors import InputError, UnsupportedError, shown

SECOND_HALF, EVERY = "second_half", "all"


class Layer(NamedTuple):
    """A layer, and the path in it of its attention."""

    module: nn.Module
    attention: str


def refusal_of_tokens(base: nn.Module) -> str:
    """Return why no tokens can be left out of a model's attention; "" if they can."""
    if not isinstance(base, PreTrainedModel):
        return "it is not a model of transformers"
    if base.config.is_encoder_decoder or base.get_output_embeddings() is None:
        return "it is no decoder: other positions are read than those before"
    attentions = [layer.module.get_submodule(layer.attention) for layer in all_layers(base)]
    if not attentions:
        return "its layers have no attention with rotary positions that they pass to it"
    if not all(getattr(each, "is_causal", True) for each in attentions):
        return "its tokens attend to later ones too, as in masked language models"
    if any(map(_counts_tokens, attentions)):
        return "its attention scales queries by the tokens it counts (attn_temperature_tuning)"
    return ""


def all_layers(base: nn.Module) -> list[Layer]:
    """Return the layers of a decoder; [] if one has not exactly one attention of the form."""
    found = []
    for _, module in blocks(base):
        paths = [path for path, part in module.named_modules() if path and _is_attention(part)]
        if len(paths) != 1:
            return []
        found.append(Layer(module, paths[0]))
    return found


def places_of(base: nn.Module, layers: str | Sequence[int]) -> dict[int, Layer]:
    """Return the layers that are asked for, by number.

    Args:
        layers: `second_half`, `all`, or numbers from 0.

    Raises:
        UnsupportedError: the model has none.
        InputError: a number is none of a layer.
    """
    reason = refusal_of_tokens(base)
    if reason:
        raise UnsupportedError(f"no tokens of {type(base).__name__} can be left out: {reason}")
    found = all_layers(base)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        if layers not in (SECOND_HALF, EVERY):
            raise InputError(
                f"layers={shown(layers)} is neither {SECOND_HALF}, {EVERY} nor a list of numbers"
            )
        start = len(found) // 2 if layers == SECOND_HALF else 0
        return {number: found[number] for number in range(start, len(found))}
    wrong = [n for n in layers if not (type(n) is int and 0 <= n < len(found))]
    if wrong or not layers:
        raise InputError(
            f"layers={shown(list(layers))}: {type(base).__name__} has layers 0 to {len(found) - 1}"
        )
    return {number: found[number] for number in sorted({*layers})}


def width_of_states(base: PreTrainedModel) -> int:
    """Return H; raise UnsupportedError if the heads of predictors do not divide it."""
    config = base.config.get_text_config()
    if config.hidden_size % config.num_attention_heads:
        raise UnsupportedError(
            f"predictors divide hidden states by head, and {config.num_attention_heads} heads do "
            f"not divide hidden_size={config.hidden_size}: choose scorer=norm"
        )
    return config.hidden_size


def _counts_tokens(attention: Any) -> bool:
    # Llama 4's, in layers without rotary positions: it is given no position of a token
    return bool(getattr(attention, "attn_temperature_tuning", False) and not attention.use_rope)


def _is_attention(module: nn.Module) -> bool:
    names = inspect.signature(original_class(module).forward).parameters
    return {"hidden_states", "position_embeddings", "attention_mask"} <= {*names} and hasattr(
        module, "config"
    )
