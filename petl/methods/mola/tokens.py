"""The tokens of a call of a model, as a router over them needs them.

Shapes: B rows, T tokens, S tokens in the cache, H width of the embedding.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from petl.core.masks import CACHES, as_2d, positions_in
from petl.errors import InputError, UnsupportedError


@dataclass
class RoutedTokens:
    """The tokens of one forward pass of the model.

    Attributes:
        ids: [B, T]; None if embeddings were given.
        embedded: what the base's embedding makes of them, [B, T, H], detached; None if no router
            reads it.
        positions: [B, T] or [1, T].
        allowed: True where a token attends to a cached or new one, broadcast to [B, 1, T, S + T];
            None: to all up to itself, without a cache.
        follows: True where the token before belongs to the same text, [B, T].
        is_tree: the mask is 4-D, so the token before may not be the column before.
    """

    ids: Tensor | None
    embedded: Tensor | None
    positions: Tensor
    allowed: Tensor | None
    follows: Tensor
    is_tree: bool

    def check_lookahead(self, lookahead: int) -> None:
        """Raise UnsupportedError for a lookahead if the token before each one is not known."""
        if lookahead and self.is_tree:
            raise UnsupportedError(
                f"router_lookahead={lookahead} reads the token before each one, which a 4-D "
                "attention mask does not tell; pass a 2-D mask, or train with router_lookahead=0"
            )


def cache_in(given: Mapping[str, object]) -> Cache | None:
    """Return the cache among a model's arguments, or None.

    Raises:
        UnsupportedError: it is of another type than the caches of transformers.
    """
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if cache is not None and not isinstance(cache, Cache):
        raise UnsupportedError(
            f"router_type='pregated' cannot keep its states in a {type(cache).__name__}; pass a "
            "cache of transformers, such as DynamicCache()"
        )
    return cache


def cache_of(output: object) -> Cache | None:
    """Return the cache in a model's output, or None."""
    values = output.values() if isinstance(output, Mapping) else output
    values = values if isinstance(values, Iterable) and not isinstance(values, Tensor) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def tokens_of(
    model: Any, given: Mapping[str, Any], past: int, *, reads_embedding: bool
) -> RoutedTokens:
    """Return the tokens of a call of the model, of which the cache has `past` ones before.

    Args:
        model: the base model.
        given: its arguments by name.
        past: S.
        reads_embedding: True if a router reads the base's embedding of the tokens.

    Raises:
        InputError: there are no tokens, or the mask has fewer columns than there are tokens.
        UnsupportedError: the mask has a form that cannot be read.
    """
    ids: Tensor | None = given.get("input_ids")
    embedded: Any = given.get("inputs_embeds")
    source = embedded if ids is None else ids
    if source is None:
        raise InputError(
            "router_type='pregated' reads input_ids, and the model was called with neither "
            f"input_ids nor inputs_embeds but {', '.join(map(str, given)) or 'no argument'}"
        )
    if reads_embedding:
        with torch.no_grad():
            embedded = source if ids is None else model.get_input_embeddings()(ids)
    mask = given.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, Mapping) else mask
    T = source.shape[1]
    key_BS, tree = _read_mask(mask, T, past + T)
    positions = _positions(given.get("position_ids"), key_BS, T, past, source.device)
    is_packed = (
        given.get("position_ids") is not None
        and cache_in(given) is None
        and (mask is None or getattr(model, "petl_packs", False))
    )
    # each text of a packed row starts where positions do not go on, see petl/data/tasks/packing.py
    starts_BT = F.pad(positions.diff(dim=1) != 1, (1, 0)) if is_packed else None
    return RoutedTokens(
        ids,
        embedded.detach() if reads_embedding else None,
        positions,
        _allowed(key_BS, tree, starts_BT, T, past, source.device),
        _follows(key_BS, starts_BT, source, past),
        tree is not None,
    )


def _read_mask(mask: object, T: int, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """Return a 2-D mask as [B, S + T] booleans, and a 4-D one, maybe additive, as [B, 1, T, S + T].

    None for the other of the two, or for both without a mask.
    """
    keys = as_2d(mask)
    if keys is not None and keys.shape[1] < columns:
        raise InputError(
            f"attention_mask has {keys.shape[1]} columns for {columns} tokens, those in the cache "
            "included; pass the mask of all of them"
        )
    if mask is None or keys is not None:
        return None if keys is None else keys[:, :columns].bool(), None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise UnsupportedError(
            f"router_type='pregated' cannot read an attention_mask of type {type(mask).__name__}; "
            "pass a 2-D mask, or a 4-D tensor"
        )
    tree = mask[:, :1, -T:, :columns]
    return None, tree if tree.dtype == torch.bool else tree >= 0


def _positions(
    given: Tensor | None, key_BS: Tensor | None, T: int, past: int, device: torch.device
) -> Tensor:
    if given is not None:
        return given[0] if given.dim() == 3 else given  # the first axis of multimodal positions
    if key_BS is not None:
        return positions_in(key_BS)[:, past:]
    return torch.arange(past, past + T, device=device)[None]


def _allowed(
    key_BS: Tensor | None,
    tree: Tensor | None,
    starts_BT: Tensor | None,
    T: int,
    past: int,
    device: torch.device,
) -> Tensor | None:
    parts = [] if tree is None else [tree]
    if key_BS is not None:
        parts.append(key_BS[:, None, None])
    if starts_BT is not None:
        text_BT = starts_BT.cumsum(1)
        parts.append((text_BT[:, :, None] == text_BT[:, None])[:, None])
    if not parts and not past:
        return None
    row_T1 = torch.arange(past, past + T, device=device)[:, None]
    column_S = torch.arange(past + T, device=device)
    allowed = column_S <= row_T1
    for part in parts:
        allowed = allowed & part
    # itself too, so that no row of the softmax is empty
    return allowed | (column_S == row_T1)


def _follows(key_BS: Tensor | None, starts_BT: Tensor | None, source: Tensor, past: int) -> Tensor:
    B, T = source.shape[:2]
    follows_BT = torch.ones(B, T, dtype=torch.bool, device=source.device)
    if key_BS is not None:  # the column before is no padding
        follows_BT = F.pad(key_BS, (1, 0))[:, past : past + T]
    if starts_BT is not None:
        follows_BT = follows_BT & ~starts_BT
    if not past:  # nothing is before the first column
        follows_BT = F.pad(follows_BT[:, 1:], (1, 0))
    return follows_BT
