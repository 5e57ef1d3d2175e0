"""The keys and values of a batch whose rows come and go.

Rows of different lengths have padding on the left. Shapes: B rows, H heads, T tokens, D width.
"""

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from petl.efficiency.in_place_cache import InPlaceLayer, write_in_place

# exactly these classes: a subclass may keep other states
MERGEABLE = (DynamicLayer, DynamicSlidingWindowLayer)


def holds_only_keys_and_values(config: PretrainedConfig) -> bool:
    """True if the cache of a model is keys and values per token, so that rows can be put together.

    Recurrent layers, as in Mamba, have other states, which padding would change.
    """
    return all(type(layer) in MERGEABLE for layer in DynamicCache(config=config).layers)


def has_plain_layers(cache: DynamicCache) -> bool:
    """True if keys and values are all that a cache has, so that they can be put into another."""
    return all(type(layer) in (*MERGEABLE, InPlaceLayer) for layer in filled(cache))


def new_cache(config: PretrainedConfig, *, mergeable: bool) -> DynamicCache:
    """An empty cache.

    Args:
        mergeable: for `append` and `keep`. Layers with a sliding window then keep all tokens, since
            rows with different padding have different windows; the attention mask hides the rest.
    """
    return write_in_place(DynamicCache() if mergeable else DynamicCache(config=config))


def append(cache: DynamicCache, other: DynamicCache) -> None:
    """Add the rows of `other` behind those of `cache`, after padding to the same length."""
    for layer, added in zip(filled(cache), filled(other), strict=True):
        layer.keys = _below(layer.keys, added.keys)
        layer.values = _below(layer.values, added.values)


def keep(cache: DynamicCache, rows: Tensor, start: int) -> None:
    """Keep these rows only, without their first `start` tokens."""
    for layer in filled(cache):
        layer.keys = layer.keys[rows, :, start:]  # of [B, H, T, D]
        layer.values = layer.values[rows, :, start:]


def filled(cache: DynamicCache) -> list[Any]:
    """The layers that have keys and values; others share them."""
    return [layer for _, layer in numbered(cache)]


def numbered(cache: DynamicCache) -> list[tuple[int, Any]]:
    """The layers of `filled`, with their numbers."""
    layers = cast(list[Any], cache.layers)
    # in Gemma 3n, the last layers read the keys and values of earlier ones
    return [(number, layer) for number, layer in enumerate(layers) if layer.is_initialized]


def _below(first: Tensor, second: Tensor) -> Tensor:
    """Put rows [B, H, T, D] below each other."""
    rows, length = len(first), max(first.shape[2], second.shape[2])
    found = first.new_zeros(rows + len(second), first.shape[1], length, first.shape[3])
    found[:rows, :, length - first.shape[2] :] = first
    found[rows:, :, length - second.shape[2] :] = second
    return found
