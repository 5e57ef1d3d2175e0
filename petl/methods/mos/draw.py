"""Which layers share pools, which shards each layer draws, and whether there are enough of them.

Shapes: R rank, S shards per vector, L layers of a group.
"""

import hashlib
import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from petl.core.layers.layer import LayerShape
from petl.core.spec.config import require
from petl.methods.mos.config import MosConfig

FEW = 0.05  # of the public shards: so many may lie idle without a word
logger = logging.getLogger(__name__)


def groups_of(shapes: Mapping[str, LayerShape]) -> dict[str, list[str]]:
    """Module paths by group: paths that differ in indices only, in their order.

    A second shape under one path is a group of its own, with the shape in its name.
    """
    by_path: dict[str, dict[LayerShape, list[str]]] = {}
    for key, shape in shapes.items():
        path = "__".join(part for part in key.split(".") if not part.isdigit())
        by_path.setdefault(path, {}).setdefault(shape, []).append(key)
    return {
        path if i == 0 else f"{path}__{shape.in_features}x{shape.out_features}": members
        for path, by_shape in by_path.items()
        for i, (shape, members) in enumerate(by_shape.items())
    }


def check_widths(config: MosConfig, shapes: Mapping[str, LayerShape]) -> None:
    """Raise InputError unless each vector can be cut into shards; the message says which can."""
    shards, common = config.shards_per_vector, math.gcd(*(w for s in shapes.values() for w in s))
    fitting = ", ".join(str(n) for n in range(1, 65) if common % n == 0)
    for key, shape in shapes.items():
        for name, width in shape._asdict().items():
            require(
                width % shards == 0,
                f"{key}: {name}={width} is not divisible by shards_per_vector={shards}; "
                f"{fitting} divide all widths of these targets",
            )


def check_layers(config: MosConfig, groups: Mapping[str, list[str]]) -> None:
    """Raise InputError unless a layer of each group finds as many public vectors as it draws.

    The message says what would suit all groups: the one with the fewest layers has the fewest.
    """
    group = min(groups, key=lambda name: len(groups[name]))
    L, needed, private = len(groups[group]), config.r - config.private_rank, config.private_rank
    public = (config.equivalent_rank - private) * L
    require(
        needed <= public,
        f"r - private_rank = {needed} exceeds the {public} public vectors of group {group} "
        f"({L} layers); for these targets set r to at most {private + public}, or "
        f"equivalent_rank to at least {private + math.ceil(needed / L)}",
    )


def draw(config: MosConfig, group: str, layers: int, ordinal: int, side: str) -> Tensor:
    """The pool rows, int32 [R S], of a group's layer number `ordinal` (from 0) of `layers`.

    Layers draw alike without subset selection, and sides "A" and "B" without pair dissociation.
    """
    shards, private = config.shards_per_vector, config.private_rank
    public = (config.equivalent_rank - private) * layers * shards
    seeds = (
        config.seed,
        group,
        ordinal if config.subset_selection else None,
        side if config.pair_dissociation else None,
    )
    digest = hashlib.sha256(repr(seeds).encode()).digest()  # the same in every process and version
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    order = torch.randperm(public, generator=generator, device="cpu")
    own = torch.arange(ordinal * private * shards, (ordinal + 1) * private * shards, device="cpu")
    return torch.cat([order[: (config.r - private) * shards], public + own]).int()


def log_coverage(config: MosConfig, side: str, drawn: list[list[Tensor]]) -> None:
    """Log it if no layer draws more than a few of the public shards, which nothing then trains.

    Args:
        drawn: for each group, the rows that each of its layers draws.
    """
    per_layer = (config.equivalent_rank - config.private_rank) * config.shards_per_vector
    public = [per_layer * len(layers) for layers in drawn]
    used = [
        int((torch.cat(layers).unique() < count).sum())
        for layers, count in zip(drawn, public, strict=True)
    ]
    if sum(public) - sum(used) > FEW * sum(public):
        idle = 100 * (1 - sum(used) / sum(public))
        logger.info(
            "MoS: %.1f %% of the shards in pool %s are drawn by no layer, so nothing trains them; "
            "a higher r or a lower equivalent_rank leaves fewer idle",
            idle,
            side,
        )
