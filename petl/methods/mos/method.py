"""The method MoS: draws, pools, and the gather of each forward pass."""

from functools import partial

import torch
from torch import Tensor

from petl.core.method import Method, NewAdapters, Settings, TrainContext, WrapContext
from petl.core.model.heat_map import HeatMap, without_common_parts
from petl.core.register import register
from petl.core.support import Capability
from petl.methods.mos.adapter import MosAdapter, Pools, gather_all
from petl.methods.mos.config import MosConfig
from petl.methods.mos.draw import check_layers, check_widths, draw, groups_of, log_coverage


@register
class Mos(Method[MosConfig, MosAdapter]):
    """Low-rank factors of shards that the layers of a role share."""

    name = "mos"
    config_cls, adapter_cls = MosConfig, MosAdapter
    summary = "low-rank factors of shards that layers share: high rank with few parameters"
    paper = "Wang et al. 2025, MoS: Mixture of Shards, ICLR, arXiv:2410.00938"
    need = "few parameters"
    recommended = "the rank of a LoRA with a fraction of its parameters; merges and exports as LoRA"
    lacks = {
        Capability.RANKS: "its layers share their pools",
        Capability.TOGETHER: "",
    }
    strength_tensors = ("pool_B_*",)
    components = "they are drawn from pools that its layers share"
    by_position = True

    def settings(self, c: WrapContext[MosConfig]) -> dict[str, Settings]:
        """The group of each target, and the pool rows that it draws."""
        config, groups = c.config, groups_of(c.shapes)  # layers of one role
        check_widths(config, c.shapes)
        check_layers(config, groups)
        settings: dict[str, Settings] = {}
        is_dry_run = next(c.model.parameters()).is_meta  # only shapes count
        for group, members in groups.items():
            for i, key in enumerate(members):
                rows = {
                    f"index_{side}": torch.empty(
                        config.r * config.shards_per_vector, dtype=torch.int32, device="meta"
                    )
                    if is_dry_run
                    else draw(config, group, len(members), i, side)
                    for side in "AB"
                }
                settings[key] = {"group": group, **rows}
        if is_dry_run:
            return settings
        for side in "AB":
            drawn = [
                [settings[key][f"index_{side}"] for key in members] for members in groups.values()
            ]
            log_coverage(config, side, drawn)
        return settings

    def shared(self, c: WrapContext[MosConfig]) -> Pools:
        """The pools that all layers of an adapter draw from."""
        return Pools(c.config, c.shapes)

    def added(self, new: NewAdapters[MosConfig, MosAdapter]) -> None:
        """Let the model gather the factors of all layers before it runs."""
        if new.once("gather"):
            # on the base model, so that it runs outside checkpointed segments
            new.hooks.append(new.model.register_forward_pre_hook(partial(gather_all, new.placed)))

    def heat_maps(self, t: TrainContext[MosConfig, MosAdapter]) -> list[HeatMap]:
        """How many layers draw each shard."""
        drawn: dict[str, list[Tensor]] = {}
        pools: dict[str, int] = {}
        for _, adapter in t.adapters:
            for side, pool, index in zip(
                "AB", adapter.pools, (adapter.index_A, adapter.index_B), strict=True
            ):
                key = f"{adapter.group.replace('__', '.')} {side}"
                # rows of the pool, which are its shards
                pools[key] = len(pool)
                drawn.setdefault(key, []).append(index.cpu().long())
        uses = {
            key: torch.bincount(torch.cat(drawn[key]), minlength=size)
            for key, size in pools.items()
        }
        if not uses:
            return []
        most = int(max(counts.max() for counts in uses.values()))
        share = {
            key: (100 * torch.bincount(counts, minlength=most + 1) / len(counts)).tolist()
            for key, counts in uses.items()
        }
        use = HeatMap(
            "shard_use",
            "MoS: number of layers that draw a shard",
            "% of the pool's shards",
            without_common_parts(share),
            [str(count) for count in range(most + 1)],
            list(share.values()),
            "The share of a pool's shards that so many layers draw. Shards of column 0 are drawn "
            "by none and do not train; those of column 1 belong to one layer.",
            "pool",
            "layers that draw a shard",
        )
        return [use]
