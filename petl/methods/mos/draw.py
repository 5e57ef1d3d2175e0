"""Groups of layers that share pools, the draw of shards for each layer, and checks of both.

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

FEW = 0.05  # fraction of public shards that may be unused without a log message; assumption
logger = logging.getLogger(__name__)


def groups_of(shapes: Mapping[str, LayerShape]) -> dict[str, list[str]]:
    """Module paths by group. A group has the paths that differ in their indices only, in order.

    Layers of another shape under the same path form a group of their own, named with the shape.
    """
    by_path: dict[str, dict[LayerShape, list[str]]] = {}
    for key, shape in shapes.items():
        # a parameter's name must not contain dots
        path = "__".join(part for part in key.split(".") if not part.isdigit())
        by_path.setdefault(path, {}).setdefault(shape, []).append(key)
    return {
        path if i == 0 else f"{path}__{shape.in_features}x{shape.out_features}": members
        for path, by_shape in by_path.items()
        for i, (shape, members) in enumerate(by_shape.items())
    }


def check_widths(config: MosConfig, shapes: Mapping[str, LayerShape]) -> None:
    """Raise InputError unless `shards_per_vector` divides all widths; list the valid numbers."""
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
    """Raise InputError unless each group has as many public vectors as a layer draws.

    The message has the valid values for all groups: they follow from the smallest group.
    """
    group = min(groups, key=lambda name: len(groups[name]))
    L, needed, private = len(groups[group]), config.r - config.private_rank, config.private_rank
    # vectors, not shards
    public = (config.equivalent_rank - private) * L
    require(
        needed <= public,
        f"r={config.r} is too large for {L} layers in group {group}: set r <= {private + public} "
        f"or equivalent_rank >= {private + math.ceil(needed / L)}",
    )


def draw(config: MosConfig, group: str, layers: int, ordinal: int, side: str) -> Tensor:
    """Draw the pool rows, int32 [R S], of layer `ordinal` (from 0) of the `layers` of a group.

    Without subset selection the draw is equal for all layers; without pair dissociation, for both
    sides "A" and "B".
    """
    shards, private = config.shards_per_vector, config.private_rank
    public = (config.equivalent_rank - private) * layers * shards
    seeds = (
        # everything that the draw depends on; None where layers or sides share it
        config.seed,
        group,
        ordinal if config.subset_selection else None,
        side if config.pair_dissociation else None,
    )
    # unlike `hash`, equal in every process and Python version
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    # without replacement: a layer uses no public shard twice
    order = torch.randperm(public, generator=generator, device="cpu")
    own = torch.arange(ordinal * private * shards, (ordinal + 1) * private * shards, device="cpu")
    return torch.cat([order[: (config.r - private) * shards], public + own]).int()


def log_coverage(config: MosConfig, side: str, drawn: list[list[Tensor]]) -> None:
    """Log the fraction of public shards that no layer draws, if it is above `FEW`.

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
        unused = 100 * (1 - sum(used) / sum(public))
        logger.info(
            "MoS: %.1f %% of the shards in pool %s are drawn by no layer and will not train; a "
            "higher r or a lower equivalent_rank leaves fewer unused",
            unused,
            side,
        )
