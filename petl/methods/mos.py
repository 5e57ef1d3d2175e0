"""MoS: low-rank factors glued together from shards that the layers of a model share.

Wang et al. 2025, "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of
Shards", ICLR (arXiv:2410.00938).

Shapes: I in, O out, R rank, E equivalent rank (the budget), P private rank, S shards per vector,
L layers of a group. A group is all targets that play one role, such as every `q_proj`. It has two
pools of shards, `pool_A` [E L S, I/S] and `pool_B` [E L S, O/S]; rows below (E-P) L S are public,
then each layer has P S rows of its own. A layer holds the rows it draws, `index_A` and `index_B`
[R S], public ones first; row j of its A is shards j S to j S + S - 1 side by side. So it is a LoRA
of rank R, and all of them have as many parameters as LoRA of rank E.

Each of the paper's four differentiators can be switched off: subset selection and pair dissociation
by their fields, vector sharding by shards_per_vector=1, shard privatization by private_rank=0.

Where the sources disagree: the routing is a frozen draw and a pool belongs to one group, as in the
authors' code, not "MoE-like" and global as in the text; the frozen random scaling of the code is
left out, for it is the identity. The draw has a generator of its own, so that all processes agree.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petl.core.config import MethodConfig, about, in_proportion, require
from petl.core.context import num_processes
from petl.core.layer import Adapter, Factors, LayerShape, Site
from petl.core.registry import register
from petl.core.tuner import MethodTuner
from petl.errors import UnsupportedError

FEW = 0.05  # of the public shards: so many may lie idle without a word
logger = logging.getLogger(__name__)


@dataclass
class MosConfig(MethodConfig):
    """See the module's docstring: R is `r`, E equivalent_rank, P private_rank, S the shards."""

    r: int = about("rank of each layer's factors; paper: 2 to 4 times equivalent_rank", 16)
    lora_alpha: float = about("the update is scaled by lora_alpha / r", 16.0)
    lora_dropout: float = about("dropout of the adapter's input, in [0, 1); paper 0.1", 0.0)
    equivalent_rank: int = about("rank of the plain LoRA with as many parameters", 2)
    shards_per_vector: int = about("pieces of a low-rank vector; 1: no vector sharding", 4)
    private_rank: int = about("rank that each layer keeps to itself; 0: no privatization", 1)
    subset_selection: bool = about(
        "each layer draws public shards of its own; false: one draw for the group", True
    )
    pair_dissociation: bool = about("A and B are drawn apart; false: one draw for both", True)
    seed: int = about("of the draw, whatever the global random state", 0)
    init_weights: bool = about("start at the base model; false: B random, for debugging", True)
    fan_in_fan_out: bool = about("PEFT's name; Conv1D layers are recognised by themselves", False)

    def check(self) -> None:
        if self.target_modules is None:
            self.target_modules = "all-linear"
        for name, least in {
            "r": 1,
            "equivalent_rank": 1,
            "shards_per_vector": 1,
            "private_rank": 0,
        }.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(
                whole and value >= least, f"{name}={value!r} is not a whole number from {least}"
            )
        require(isinstance(self.seed, int), f"seed={self.seed!r} is not a whole number")
        require(self.lora_alpha > 0, f"lora_alpha={self.lora_alpha} is not above 0")
        require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout} is not in [0, 1)")
        r, budget, private = self.r, self.equivalent_rank, self.private_rank
        require(private <= budget, f"private_rank={private} exceeds equivalent_rank={budget}")
        require(private <= r, f"private_rank={private} exceeds r={r}")
        require(
            private < budget or r == budget,
            f"r={r} must equal equivalent_rank={budget} when all shards are private",
        )

    def sized(self, size: int) -> dict[str, Any]:
        """The equivalent rank, with `r` in proportion, and no larger a share that is private."""
        share = size / self.equivalent_rank
        r, private = max(size, round(share * self.r)), min(1.0, share) * self.private_rank
        return {**in_proportion(self, r), "equivalent_rank": size, "private_rank": int(private)}


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


class Pools(nn.Module):
    """The shards of all groups of an adapter: parameters `pool_A_<group>` and `pool_B_<group>`."""

    def __init__(self, config: MosConfig, shapes: Mapping[str, LayerShape]) -> None:
        super().__init__()
        shards = config.shards_per_vector
        for group, members in groups_of(shapes).items():
            I, O = shapes[members[0]]
            rows = config.equivalent_rank * len(members) * shards
            bound = I**-0.5  # Kaiming-uniform over the whole vector, not over a shard
            A = torch.empty(rows, I // shards, dtype=torch.float32).uniform_(-bound, bound)
            B = torch.zeros(rows, O // shards, dtype=torch.float32)
            if not config.init_weights:
                nn.init.normal_(B, std=0.02)
            self.register_parameter(f"pool_A_{group}", nn.Parameter(A))
            self.register_parameter(f"pool_B_{group}", nn.Parameter(B))


class MosAdapter(Adapter):
    """Which shards a layer uses: buffers `index_A` and `index_B`, int32 [R S]."""

    index_A: Tensor
    index_B: Tensor

    def __init__(self, shape: LayerShape, config: MosConfig, site: Site) -> None:
        super().__init__(shape, config, site)
        self.config = config
        self.group: str = site.plan["group"]
        self.register_buffer("index_A", site.plan["index_A"])
        self.register_buffer("index_B", site.plan["index_B"])

    def factors(self) -> Factors:
        config, site = self.config, self.site
        context = site.context
        if context.recording and not torch.is_grad_enabled() and num_processes() > 1:
            raise UnsupportedError(
                "method 'mos' cannot run under reentrant checkpointing in several processes: the "
                "pools' gradients would be reduced before they are complete; pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        A = gather(getattr(site.pool, f"pool_A_{self.group}"), self.index_A, config.r)
        B = gather(getattr(site.pool, f"pool_B_{self.group}"), self.index_B, config.r)
        return Factors(A, B.t(), config.lora_alpha / config.r)

    @property
    def drop_rate(self) -> float:
        return self.config.lora_dropout if self.training else 0.0


def gather(pool: Tensor, index: Tensor, rank: int) -> Tensor:
    """The vectors [R, S W] made of the rows `index` [R S] of a pool of shards of width W."""
    rows = pool.index_select(0, index.to(pool.device))
    return rows.view(rank, -1).to(index.device)  # a model may be spread over devices


@register(
    "mos",
    summary="low-rank factors made of shards that layers share: a high rank from a small budget",
    paper="Wang et al. 2025, MoS: Mixture of Shards, ICLR, arXiv:2410.00938",
)
class MosModel(MethodTuner):
    """The tuner of `MosConfig`."""

    config_cls, adapter_cls = MosConfig, MosAdapter

    def layout(
        self, config: MosConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """The group of each target and the rows that it draws."""
        groups = groups_of(shapes)
        check_widths(config, shapes)
        check_layers(config, groups)
        plans: dict[str, dict[str, Any]] = {}
        for group, members in groups.items():
            for i, key in enumerate(members):
                rows = {
                    f"index_{side}": draw(config, group, len(members), i, side) for side in "AB"
                }
                plans[key] = {"group": group, **rows}
        for side in "AB":
            drawn = [
                [plans[key][f"index_{side}"] for key in members] for members in groups.values()
            ]
            log_coverage(config, side, drawn)
        return plans

    def make_pool(self, config: MosConfig, shapes: Mapping[str, LayerShape]) -> Pools:
        """The shards that all layers of an adapter draw from."""
        return Pools(config, shapes)
