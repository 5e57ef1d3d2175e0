"""The cache behind a pass over drafts: which one can be used, and what is kept of it.

Shapes: S tokens in the cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, cache_utils
from transformers.cache_utils import DynamicLayer

from petl.efficiency.in_place_cache import own_tokens

# layers of a cache that keep more than the keys and values of all tokens; some are new in 5.24
OTHER_STATES = tuple(
    getattr(cache_utils, name)
    for name in (
        "DynamicSlidingWindowLayer",
        "DynamicIndexedLayer",
        "LinearAttentionCacheLayerMixin",
    )
    if hasattr(cache_utils, name)
)


def refusal(cache: object) -> str:
    """Return why drafts cannot be taken off a cache; "" if they can."""
    cache = own_tokens(cache)
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        return f"its cache is a {type(cache).__name__}"
    # none before the first pass in some caches: the engine asks again behind the prefill
    for layer in layers:
        if not hasattr(layer, "is_croppable"):
            return (
                f"transformers {transformers.__version__} has caches that are not cropped by a "
                "number of tokens; 5.24 has"
            )
        if not layer.is_croppable or isinstance(layer, OTHER_STATES):
            return f"its cache has a {type(layer).__name__}, which keeps more than keys and values"
        # `compact` reads the length off the shape, which in static layers is the capacity
        if hasattr(layer, "keys") and not isinstance(layer, DynamicLayer):
            return f"its cache has a {type(layer).__name__}, which has a fixed size"
    return ""


def compact(cache: Cache, path: Sequence[int], count: int) -> None:
    """Keep the accepted nodes of the last pass in a cache, and remove the others.

    Args:
        cache: of which `refusal` returned "".
        path: numbers of the accepted nodes in order; the root, 0, is the first.
        count: number of tokens of the pass, with those that only pad it.
    """
    moved = next((i for i, node in enumerate(path) if node != i), None)
    if moved is not None:
        own: Any = own_tokens(cache)
        layers: list[Any] = own.layers
        index: dict[torch.device, Tensor] = {}  # one transfer for each device, not for each layer
        for layer in layers:
            if getattr(layer, "is_initialized", False):
                device = layer.keys.device
                if device not in index:
                    index[device] = torch.tensor(path[moved:], device=device)
                start = layer.keys.shape[2] - count  # of [1, heads, S, width]
                for states in (layer.keys, layer.values):
                    nodes = states[:, :, start:]
                    # index_select copies, so that no entry is overwritten before it is read
                    nodes[:, :, moved : len(path)] = nodes.index_select(2, index[device])
    if count > len(path):  # crop takes negative numbers
        cache.crop(len(path) - count)
