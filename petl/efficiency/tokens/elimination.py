"""A block of a decoder whose attention computes the kept tokens alone.

Kept tokens go through attention in their order and with their own positions; its output is zero at
the others, which the residual carries on. Which are kept is decided before the block runs, from
its input, and is an argument of its forward pass: checkpointing, which computes the block again,
has it with the others.

Shapes: B rows, T tokens, P kept tokens, H width of the hidden states.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import AttentionInterface

from petl.core.layers.class_swap import SwappedClass, original_class
from petl.core.masks import CACHES
from petl.core.support import Capability
from petl.core.types import Arguments
from petl.efficiency.tokens.scores import Choice, pooled_map
from petl.errors import UnsupportedError

# what computes or reads positions that the attention of a block leaves out
LACKS: Mapping[str, str] = {
    Capability.SKIP: "tokens are left out of attention already (tokens=lemo)",
    Capability.STORE: "its states are those of all tokens, and tokens=lemo leaves some out",
    Capability.TOGETHER: "tokens=lemo leaves out tokens by the states of one run",
}
ASKING = "petl_queries_and_keys"  # an implementation of attention that computes none
Scorer = Callable[["TokenBlock", Tensor, Tensor, Arguments], Tensor]


class TokenBlock(SwappedClass):
    """Mixin for a block.

    Attributes:
        choice: how many blocks of tokens are kept.
        scorer: the scores [B, N] from this block, its input [B, T, H], which tokens are no padding
            [B, T], and its further arguments.
        attention_path: of its attention.
        reads_rows: it is the first layer, which looks for rows of several texts: a wait for the
            device, once in a pass.
    """

    lacks: ClassVar[Mapping[str, str]] = LACKS
    choice: Choice
    scorer: Scorer
    attention_path: str
    reads_rows: bool = False

    def __call__(self: Any, *args: object, **kwargs: object) -> object:
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs["kept_tokens"] = self.kept(hidden, kwargs)
        return super().__call__(*args, **kwargs)

    @torch.no_grad()
    def kept(self, hidden: Tensor, kwargs: Arguments) -> Tensor | None:
        """Return the positions of the kept tokens, [B, P]; None for all.

        Raises:
            UnsupportedError: a row has several texts, and nothing tells a block of which to keep.
        """
        tokens, positions = hidden.shape[1], kwargs.get("position_ids")
        if self.choice.count(tokens) * self.choice.block >= tokens:
            return None
        valid = valid_tokens(kwargs.get("attention_mask"), hidden)
        # those of a plan have no values
        known = isinstance(positions, Tensor) and not isinstance(positions, FakeTensor)
        if self.reads_rows and known and has_several(positions, valid):
            raise UnsupportedError(
                "position_ids begin again within a row, so it has several texts, and blocks of "
                "tokens are left out of one: give each text a row of its own, or leave"
                " drop_tokens out"
            )
        return self.choice.positions(self.scorer(self, hidden, valid, kwargs), valid)

    def forward(
        self: Any, *args: object, kept_tokens: Tensor | None = None, **kwargs: object
    ) -> object:
        if kept_tokens is None:
            return super().forward(*args, **kwargs)
        attention = self.get_submodule(self.attention_path)
        attention.kept = kept_tokens
        try:
            return super().forward(*args, **kwargs)
        finally:
            del attention.kept


class TokenAttention(SwappedClass):
    """Mixin for the attention of a `TokenBlock`.

    Attributes:
        kept: positions [B, P], set by the block while it computes.
    """

    kept: Tensor | None = None

    def forward(self: Any, *args: object, **kwargs: object) -> object:
        positions = self.kept
        if positions is None:
            return super().forward(*args, **kwargs)
        # whichever of its arguments the layer passes by position
        names = inspect.signature(original_class(self).forward).parameters
        given: Arguments = dict(zip([*names][1:], args, strict=False)) | kwargs
        hidden = given["hidden_states"]
        given |= at_positions(given, positions)
        out, *others = super().forward(**given)
        index = positions[..., None].expand(-1, -1, out.shape[-1])
        whole = out.new_zeros(*hidden.shape[:2], out.shape[-1]).scatter(1, index, out)
        return (whole, *others)


def at_positions(given: Arguments, positions: Tensor) -> Arguments:
    """Return arguments of an attention at some positions, without a cache."""
    found: Arguments = {name: None for name in CACHES if given.get(name) is not None}
    found["hidden_states"] = taken(given["hidden_states"], positions)
    turns = given["position_embeddings"]  # cosines and sines; of Llama 4 complex numbers
    is_one = isinstance(turns, Tensor)
    parts = [taken(each, positions) for each in ([turns] if is_one else turns)]
    found["position_embeddings"] = parts[0] if is_one else tuple(parts)
    for name in ("position_ids", "cache_position"):
        ids = given.get(name)
        if isinstance(ids, Tensor):
            rows = ids.expand(len(positions), -1)
            found[name] = rows.gather(1, positions)
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor):
        found["attention_mask"] = mask_at(mask, positions)
    return found


def taken(x: Tensor, positions: Tensor) -> Tensor:
    """Return [B, P, H], the values of x [B or 1, T, H] at the positions."""
    rows, tokens = x.shape[:2]
    first = tokens * torch.arange(rows, device=x.device)  # in x, of each row
    # gather would keep all of x for backward
    index = (positions + first[:, None]).flatten()
    return x.reshape(rows * tokens, -1).index_select(0, index).view(*positions.shape, -1)


def mask_at(mask: Tensor, positions: Tensor) -> Tensor:
    """Return a mask [B, 1, T, T], or of flash attention [B, T], of the tokens at the positions."""
    if mask.dim() == 2:
        return mask.gather(1, positions)
    rows = mask.expand(len(positions), -1, -1, -1)
    at = positions[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    columns = positions[:, None, None, :].expand(-1, rows.shape[1], positions.shape[1], -1)
    return rows.gather(2, at).gather(3, columns)


def valid_tokens(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Return which tokens are no padding, [B, T], from the mask of an attention.

    In one of [B, 1, T, T] a token of a text attends to itself, and nothing attends to padding.
    """
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask.dim() == 4:
        allowed = mask if mask.dtype == torch.bool else mask > -1
        mask = allowed.diagonal(dim1=-2, dim2=-1)[:, 0]
    return mask.expand(len(hidden), -1).bool()


def has_several(positions: Tensor, valid: Tensor) -> bool:
    """Return True if a row has several texts: with each of them positions begin again.

    Args:
        positions: [B or 1, T]; those of padding may be anything.
        valid: False for padding, [B, T].
    """
    positions = torch.where(valid, positions, -1)
    return bool((valid & (positions < positions.cummax(-1).values)).any())


# Queries and keys of an attention, for `oracle` and to train predictors


class _Asked(Exception):
    """Ends the pass of a block at its attention, whose arguments it has."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments


def _queries_and_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> NoReturn:
    """End the pass of an attention as its implementation."""
    raise _Asked({"queries": query, "keys": key, "scale": kwargs["scaling"]})


AttentionInterface.register(ASKING, _queries_and_keys)


@torch.no_grad()
def oracle_map(layer: nn.Module, path: str, size: int, hidden: Tensor, kwargs: Arguments) -> Tensor:
    """Return the pooled map [B, N, N] of the queries and keys of a layer.

    Args:
        path: of its attention.
        size: tokens of a block.
        hidden: input of the layer, [B, T, H].
        kwargs: its further arguments.

    Raises:
        UnsupportedError: its queries and keys are not known.
    """
    attention: Any = layer.get_submodule(path)
    valid = valid_tokens(kwargs.get("attention_mask"), hidden)
    own = attention.config
    asking = copy.copy(own)
    asking._attn_implementation_internal = ASKING
    # its own instance: the config is that of all layers
    attention.config = asking
    try:
        # a cache would get the keys a second time
        left_out = (*CACHES, "hidden_states")
        given = {name: value for name, value in kwargs.items() if name not in left_out}
        original_class(layer).forward(layer, hidden, **given)
    except _Asked as asked:
        return pooled_map(valid=valid, block=size, **asked.arguments)
    finally:
        attention.config = own
    raise UnsupportedError(
        f"{type(attention).__name__} does not take its implementation of attention from "
        "transformers, so that its queries and keys are not known: choose scorer=norm"
    )
