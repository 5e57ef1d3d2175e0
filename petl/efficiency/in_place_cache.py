"""Keys and values of decoding, written in place.

transformers concatenates those of all past tokens with those of each new one. Here a layer of a
cache has room behind its tokens, into which new ones are written; what a model reads is equal to
the bit. Shapes: B rows, H heads, T tokens, D width.
"""

import functools
import inspect
import logging
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from petl.core.types import Arguments, CausalModel, base_of

SPARE = 64  # tokens of room behind the last one at least; else a quarter of the tokens
SMALL = 2**15  # numbers of a layer's keys below which copying them takes a few microseconds

logger = logging.getLogger(__name__)
C = TypeVar("C")


class InPlaceLayer(DynamicLayer):
    """A layer of a cache whose `keys` and `values`, [B, H, T, D], are views of larger tensors.

    They may be cropped, or replaced as by `reorder_cache`: tensors that are not the beginning of
    the larger ones are copied into new ones. Behind a crop new tokens overwrite those cropped off.
    Short texts are concatenated as by its parent, which is as fast; likewise where gradients are
    computed or a graph is compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append tokens, [B, H, new, D], and return keys and values of all."""
        keys, values = self.keys, self.values
        if (
            keys is None
            or values is None
            or keys.numel() < SMALL
            # a backward pass would read what later tokens overwrite; a graph has no addresses
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            # of another type or batch: promoted, or refused
            or not (_continues(keys, key_states) and _continues(values, value_states))
        ):
            self._key_room = self._value_room = None
            return super().update(key_states, value_states, *args, **kwargs)
        self._key_room, self.keys = _appended(self._key_room, keys, key_states)
        self._value_room, self.values = _appended(self._value_room, values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Drop all tokens."""
        super().reset()
        self._key_room = self._value_room = None


def _continues(past: Tensor, new: Tensor) -> bool:
    """Return True if tokens are of one kind with those before them."""
    (*before, _, width), (*rows, _, new_width) = past.shape, new.shape
    alike = before == rows and width == new_width
    return alike and past.dtype == new.dtype and past.device == new.device


def _appended(room: Tensor | None, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Write tokens behind past ones, into a new room if need be; return room and all tokens."""
    length, count = past.shape[-2], new.shape[-2]
    total = length + count
    if room is None or total > room.shape[-2] or not _is_beginning(past, room):
        room = new.new_empty(*new.shape[:-2], total + max(SPARE, total // 4), new.shape[-1])
        room.narrow(-2, 0, length).copy_(past)
    room.narrow(-2, length, count).copy_(new)
    return room, room.narrow(-2, 0, total)


def _is_beginning(past: Tensor, room: Tensor) -> bool:
    """Return True if tokens are the first ones of a room that can be written to."""
    return (
        past.data_ptr() == room.data_ptr()
        and past.stride() == room.stride()
        and past.shape[:-2] == room.shape[:-2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )


# Caches


def cache_argument(model: nn.Module) -> str:
    """Return the name of a model's argument and output for its cache."""
    # renamed in transformers 5.24
    accepted = inspect.signature(model.forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"


def own_tokens(cache: object) -> object:
    """Return the cache of the tokens that a model writes.

    Of an encoder-decoder it is the one of self-attention; that of cross-attention stays as it is.
    """
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def write_in_place(cache: C) -> C:
    """Let the empty layers of a cache write in place, and return it.

    Only those that keep the keys and values of all tokens, in a `DynamicCache` that stays on its
    device: windows, recurrent states, quantised and offloaded caches are left as they are.
    """
    own = own_tokens(cache)
    if type(own) is DynamicCache and not own.offloading:
        own.layers = [
            # exactly this class: a subclass may keep other states
            InPlaceLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer
            for layer in own.layers
        ]
        if own.layer_class_to_replicate is DynamicLayer:
            own.layer_class_to_replicate = InPlaceLayer
    return cache


def cache_arguments(model: nn.Module, **settings: object) -> Arguments:
    """Return arguments of `generate` for one call whose cache is written in place.

    Empty where `generate` makes another cache, which the log says once.

    Args:
        model: of transformers, or a PeftModel.
        settings: further arguments of `generate`, which may ask for another cache, or for none.
    """
    base = base_of(model)
    reason = _why_other(model, base, settings)
    if not reason:
        cache = write_in_place(DynamicCache(config=base.config))
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        others = [kind for kind in kinds if kind != InPlaceLayer.__name__]
        reason = f"its cache has layers of type {', '.join(others)}" if others else ""
        if InPlaceLayer.__name__ in kinds:
            if reason:
                _say(type(base).__name__, f"{reason}; the others are written in place")
            if base.config.is_encoder_decoder:
                cache = EncoderDecoderCache(cache, DynamicCache(config=base.config))
            return {cache_argument(base): cache}
    _say(type(base).__name__, reason)
    return {}


def _why_other(model: nn.Module, base: CausalModel, settings: Arguments) -> str:
    """Return why `generate` has to make the cache; "" if it takes one."""
    kind, config = type(base), base.generation_config
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter makes virtual tokens"
    kept = settings.get("cache_implementation", config.cache_implementation)
    if kept is not None:
        return f"cache_implementation={kept!r}"
    # None stands for True
    if settings.get("use_cache", config.use_cache) is False:
        return "use_cache=False"
    makes = (kind.generate, kind._prepare_cache_for_generation)
    inherited = (GenerationMixin.generate, GenerationMixin._prepare_cache_for_generation)
    if makes != inherited or not kind._supports_default_dynamic_cache():  # ty: ignore[invalid-argument-type]
        return "its class makes a cache of its own"
    return ""


@functools.cache  # once for each reason, not for each call
def _say(name: str, reason: str) -> None:
    logger.info("%s: keys and values are copied for each token: %s", name, reason)
