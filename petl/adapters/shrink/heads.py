"""Heads of attention: groups of query heads that share a key and a value leave together.

Shapes: H query heads, G groups, N width of a head.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.adapters.shrink.config import Config, configs_of
from petl.adapters.shrink.counts import group_count
from petl.core.layers.layer import shape_of
from petl.core.model.linear import LINEAR_KINDS
from petl.core.model.mlp import kept_inputs, kept_outputs, matrix_of
from petl.core.model.structure import find_attention
from petl.core.spec.config import require
from petl.errors import UnsupportedError
from petl.training.ranks import channel_scores

FIELDS = ("num_attention_heads", "num_key_value_heads", "num_heads")


@dataclass(frozen=True)
class Heads:
    """The attention of a block: paths of its projections, and its numbers of heads.

    Attributes:
        query, key, value: write the heads, one after the other.
        output: reads them.
        width: N.
        queries: H.
        groups: G, the number of key and value heads.
    """

    query: str
    key: str
    value: str
    output: str
    width: int
    queries: int
    groups: int

    def columns(self, groups: Tensor, heads: int) -> Tensor:
        """Return the positions of the entries of groups of so many heads, rising."""
        size = heads * self.width
        return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()

    @property
    def shared(self) -> int:
        """The number of query heads of a group."""
        return self.queries // self.groups

    def best_groups(
        self, model: nn.Module, norms: Tensor, sparsity: float, b: float, c: float
    ) -> Tensor:
        """Return the groups that stay, rising: those with the largest sums of channel scores.

        Args:
            norms: of the inputs of the output projection, [H N].
            sparsity, b, c: as of `petl.shrink`.
        """
        # neither up nor gate: the term of the output projection alone
        matrix = matrix_of(model.get_submodule(self.output)).cpu()
        scores = channel_scores(matrix, norms, b=b, c=c)
        totals = scores.view(self.groups, -1).sum(1)
        order = totals.sort(descending=True, stable=True).indices
        return order[: group_count(self.groups, sparsity)].sort().values

    def changes(self, model: nn.Module, groups: Tensor) -> dict[int, object]:
        """Return the parameters without the other groups, by the `id` of the given ones."""
        changes: dict[int, object] = {}
        for path, heads in ((self.query, self.shared), (self.key, 1), (self.value, 1)):
            layer = model.get_submodule(path)
            kept = self.columns(groups.to(matrix_of(layer).device), heads)
            changes |= kept_outputs(layer, kept)
        layer = model.get_submodule(self.output)
        kept = self.columns(groups.to(matrix_of(layer).device), self.shared)
        return changes | kept_inputs(layer, kept)

    def heads_of(self, groups: Tensor) -> Tensor:
        """Return the query heads of groups, rising."""
        return (groups[:, None] * self.shared + torch.arange(self.shared)).flatten()


def find_heads(
    model: PreTrainedModel, blocks: Collection[str], sparsity: float
) -> dict[str, Heads]:
    """Return the attention of each block, by its path.

    Raises:
        UnsupportedError: the config has no `head_dim`, or a block has another attention.
        InputError: nothing would be pruned.
    """
    name = type(model).__name__
    if not any("head_dim" in each.to_dict() for each in configs_of(model.config)):
        raise UnsupportedError(
            f"the config of {name} has no head_dim, so a head has hidden_size / heads entries and "
            "fewer heads would be wider ones; leave heads out"
        )
    found = {}
    for path in blocks:
        # of a decoder behind an encoder two, and cross-attention shares the numbers of heads
        own = [each for each in find_attention(model) if each.output.startswith(f"{path}.")]
        heads = _heads_of(model, own[0]) if len(own) == 1 else None
        if heads is None:
            raise UnsupportedError(
                f"{path} of {name} has no attention whose heads can be pruned; expected is one, of "
                "layers for queries, keys, values and output; leave heads out"
            )
        require(
            group_count(heads.groups, sparsity) < heads.groups,
            f"sparsity={sparsity} leaves all {heads.groups} groups of heads of {path}; raise "
            "sparsity, or leave heads out",
        )
        found[path] = heads
    return found


def _heads_of(model: nn.Module, info: Any) -> Heads | None:
    """Return the heads of an attention; None if it has another form."""
    paths = [info.query, info.key, info.value, info.output]
    if not info.head_width or None in paths:  # one layer for all three, or unknown names
        return None
    layers = [model.get_submodule(path) for path in paths]
    if any(type(layer) not in LINEAR_KINDS for layer in layers):
        return None
    q, k, v, o = map(shape_of, layers)
    queries, groups = o.in_features // info.head_width, k.out_features // info.head_width
    is_known = q.out_features == o.in_features and k.out_features == v.out_features
    # a gate beside the queries, as in Qwen3-Next, makes them wider
    if not is_known or not groups or queries % groups:
        return None
    return Heads(*paths, info.head_width, queries, groups)


def set_heads(config: Config, before: Heads, groups: int) -> None:
    """Set the numbers of heads of a config, and the width of a head, which does not change."""
    for each in configs_of(config):
        if "head_dim" in each.to_dict() and each.num_attention_heads == before.queries:
            each.head_dim = before.width  # else derived from the number of heads
            each.num_attention_heads = groups * before.shared
            each.num_key_value_heads = groups


def note_heads(model: nn.Module, before: Heads, groups: int) -> None:
    """Let the attributes of an attention module follow its numbers of heads."""
    owner = vars(model.get_submodule(before.query.rpartition(".")[0]))
    for name in FIELDS:
        if isinstance(owner.get(name), int):  # most classes read the config
            owner[name] = groups * (1 if "key_value" in name else before.shared)
