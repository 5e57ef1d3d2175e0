"""The tuner of SHERL."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from petl.core.layers.block import place_of_argument
from petl.core.layers.layer import LayerShape
from petl.core.model.heat_map import HeatMap, finite
from petl.core.model.structure import block_widths, final_norm, layer_drop, norm_kind
from petl.core.register import register
from petl.core.spec.config import require
from petl.core.support import Capability
from petl.core.switching.norms import original_norms
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError
from petl.methods.sherl.adapter import SIZES, SherlAdapter
from petl.methods.sherl.config import Plan, SherlConfig, plan_of
from petl.methods.sherl.hooks import MEMORY, Collect, Feed, Stack


@register(
    "sherl",
    summary="a side network over frozen blocks feeds the last ones; no backward through the stack",
    need="little memory in training",
    recommended="no backward through the frozen blocks: memory of a step does not grow with depth",
    paper="Diao et al. 2024, SHERL: Synthesizing High Accuracy and Efficient Memory for "
    "Resource-Limited Transfer Learning, ECCV, arXiv:2407.07523",
)
class SherlModel(MethodTuner):
    """Tuner of `SherlConfig`."""

    config_cls, adapter_cls = SherlConfig, SherlAdapter
    needs_tuner = "hooks of the blocks feed it, which the tuner has"
    lacks = {
        Capability.MERGE: (
            "SHERL's side network is no update of a weight and cannot be merged; keep the adapter, "
            "or call unload() for the base model"
        ),
        Capability.MIXED_BATCH: "one side network at a time feeds the late blocks",
    }

    def choose_targets(self, config: Any, model: nn.Module) -> None:
        """Set the targets to the hosts, and add the last norm to `modules_to_save` if it trains."""
        plan, given = plan_of(config, model), config.target_modules
        hosts = plan.hosts
        require(
            given is None or set(given) == set(hosts),
            f"target_modules={given} are not the blocks {hosts} that side_layers="
            f"{config.side_layers} and late_layers={config.late_layers} give in "
            f"{type(model).__name__}; leave target_modules null, or load the adapter onto a model "
            "of its depth",
        )
        config.target_modules = set(hosts)
        if config.train_final_norm:
            stack = plan.stacks[0][0].rpartition(".")[0]
            norm, saved = final_norm(model, stack), config.modules_to_save or []
            require(
                norm is not None,
                f"train_final_norm=True, and {type(model).__name__} has no norm behind its blocks "
                f"({stack}); leave it false",
            )
            config.modules_to_save = [*saved, *({norm} - set(saved))]

    def block_modules(self, config: Any, model: nn.Module) -> Mapping[str, int]:
        """Return the blocks of the model."""
        return block_widths(model)

    def layer_settings(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Return the blocks that each side network reads, and the norm of the encoder's."""
        plan = plan_of(config, model)
        if len(plan.hosts) > 1:  # refused here if there is none, before the model changes
            place_of_argument(model.get_submodule(plan.hosts[0]), MEMORY)
        norms = [None, *(norm_kind(model.get_submodule(stack[0])) for stack in plan.stacks[1:])]
        return {
            host: {
                "sides": sides,
                "norm": norm,
                "in_decoder": len(plan.stacks) > 1 and norm is None,
            }
            for host, sides, norm in zip(plan.hosts, plan.sides, norms, strict=False)
        }

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject the adapter, and register the hooks of its hosts unless they are there.

        Raises:
            InputError: the adapter would train, and the model leaves out blocks while it trains.
        """
        config: Any = self.peft_config[adapter_name]
        drop = layer_drop(getattr(model, "config", None))
        is_dry_run = next(model.parameters()).is_meta  # before a file is loaded, too
        require(
            config.inference_mode or is_dry_run or not drop,
            f"the config of {type(model).__name__} has {drop}: in training it leaves out blocks at "
            "random, whose outputs the side network reads; set it to 0 in model.config",
        )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        plan = plan_of(config, model)
        # by their hosts, the adapters that share hooks; a name may have been of a deleted adapter
        known: dict[tuple[str, ...], set[str]] = self.__dict__.setdefault("served", {})
        for names in known.values():
            names.discard(adapter_name)
        key = tuple(plan.hosts)
        if key not in known:
            known[key] = set()
            stacks = [Stack(path, model, self.context, known[key]) for path in plan.hosts]
            self._register(plan, stacks, model)
        known[key].add(adapter_name)

    def _register(self, plan: Plan, readers: list[Stack], model: nn.Module) -> None:
        get, hooks = model.get_submodule, self.hooks
        main, *encoders = readers
        for reader, stack in zip(readers, plan.stacks, strict=False):
            hooks.append(get(stack[0]).register_forward_pre_hook(reader.start, with_kwargs=True))
            end = stack.index(reader.path)
            for i, path in enumerate(stack[: end + (reader is not main)]):
                collect = Collect(reader, i, ends=i == end)
                hooks.append(get(path).register_forward_hook(collect))
        for stack in plan.stacks[len(readers) :]:  # an encoder that is left alone
            hooks.append(get(stack[0]).register_forward_pre_hook(main.cut, with_kwargs=True))
        for i, path in enumerate(plan.stacks[0][plan.late :]):
            block, encoder = get(path), encoders[0] if encoders else None
            feed = Feed(block, main, encoder, is_host=i == 0)
            hooks.append(block.register_forward_pre_hook(feed, with_kwargs=True))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter.

        Raises:
            InputError: several are given.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise InputError(
                f"adapters {list(adapter_name)} cannot be active together: one side network at a "
                "time feeds the late blocks; activate one of them"
            )
        super().set_adapter(adapter_name, inference_mode)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """Remove the adapters, and with them a norm that trained beside them."""
        with original_norms(self.model):
            return super()._unload_and_optionally_merge(*args, **kwargs)

    @torch.no_grad()
    def heat_maps(self) -> list[HeatMap]:
        """Return the shares of the features in the last training batch; none before training."""
        series = self.context.series.get(SIZES, {})
        shares: dict[str, dict[str, float]] = {}
        for name in self.active_adapters:
            for host, adapter in self.placed.get(name, {}).items():
                sizes = series.get(f"{host}.{name}")
                if sizes is not None:
                    features = ["input", *map(str, cast(SherlAdapter, adapter).sides)]
                    parts = (100 * sizes / sizes.sum()).tolist()
                    shares[host.rpartition(".")[0]] = dict(zip(features, parts, strict=True))
        blocks = {column for row in shares.values() for column in row} - {"input"}
        columns = ["input", *sorted(blocks, key=int)]
        cells = [[finite(row.get(column)) for column in columns] for row in shares.values()]
        shown = HeatMap(
            "side_network",
            "SHERL: what the side network reads",
            "% of the sum over features",
            list(shares),
            columns,
            cells,
            "The mean norm of each feature's part of the sum (its weight times its tier) over the "
            "tokens of the last training batch. The last feature is the guide, whose weight is 1; "
            "the others share a weight of 1, or have none where all scores of a token are 0.",
            "list of blocks",
            "input of the first block, then blocks",
        )
        return [shown] if shares else []
