"""The tuner of MoS."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from petl.core.layers.layer import LayerShape
from petl.core.model.heat_map import HeatMap, without_common_parts
from petl.core.registry import register
from petl.core.support import Capability
from petl.core.tuners.tuner import MethodTuner
from petl.methods.mos.adapter import MosAdapter, Pools, gather_all
from petl.methods.mos.config import MosConfig
from petl.methods.mos.draw import check_layers, check_widths, draw, groups_of, log_coverage


@register(
    "mos",
    summary="low-rank factors of shards that layers share: high rank with few parameters",
    need="few parameters",
    recommended="the rank of a LoRA with a fraction of its parameters; merges and exports as LoRA",
    paper="Wang et al. 2025, MoS: Mixture of Shards, ICLR, arXiv:2410.00938",
)
class MosModel(MethodTuner):
    """Tuner of `MosConfig`."""

    config_cls, adapter_cls = MosConfig, MosAdapter
    lacks = {
        Capability.RANKS: "its layers share their pools",
        Capability.TOGETHER: "",
    }
    by_position = True

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        # on the base model, so that it runs outside checkpointed segments
        self.hooks.append(model.register_forward_pre_hook(partial(gather_all, self.placed)))

    def layer_settings(
        self, config: MosConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """The group of each target, and the pool rows that it draws."""
        groups = groups_of(shapes)  # layers of one role
        check_widths(config, shapes)
        check_layers(config, groups)
        settings: dict[str, dict[str, Any]] = {}
        is_dry_run = next(model.parameters()).is_meta  # only shapes count
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

    def make_shared(self, config: MosConfig, shapes: Mapping[str, LayerShape]) -> Pools:
        """The pools that all layers of an adapter draw from."""
        return Pools(config, shapes)

    def heat_maps(self) -> list[HeatMap]:
        """How many layers draw each shard, and the changes of the weights."""
        drawn: dict[str, list[Tensor]] = {}
        pools: dict[str, int] = {}
        for name in self.active_adapters:
            for adapter in cast(Mapping[str, MosAdapter], self.placed.get(name, {})).values():
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
            return super().heat_maps()
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
        return [use, *super().heat_maps()]
