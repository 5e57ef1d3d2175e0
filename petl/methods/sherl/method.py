"""The method SHERL: hosts of the side networks, and the hooks that feed them."""

from collections.abc import Sequence

import torch
from peft import TaskType
from torch import nn
from torch.utils.hooks import RemovableHandle

from petl.core.layers.block import place_of_argument
from petl.core.layers.layer import LayerShape
from petl.core.method import Method, NewAdapters, Settings, Target, TrainContext, WrapContext
from petl.core.model.calls import calls_of, place_of
from petl.core.model.heat_map import HeatMap, finite
from petl.core.model.names import candidate_names
from petl.core.model.structure import block_widths, final_norm, layer_drop, norm_kind
from petl.core.register import register
from petl.core.spec.config import require
from petl.core.support import Capability
from petl.errors import InputError
from petl.methods.sherl.adapter import SIZES, SherlAdapter
from petl.methods.sherl.config import SherlConfig, SherlLayout, plan_of
from petl.methods.sherl.hooks import MEMORY, BlockStack, Collect, SideFeed


def of_two_stacks(config: SherlConfig) -> str:
    """Return why FSDP1 must not shard a model with this config; "": it may."""
    if config.task_type != TaskType.SEQ_2_SEQ_LM:
        return ""
    return "FSDP1 has freed the weights of the encoder's side network when its backward comes"


@register
class Sherl(Method[SherlConfig, SherlAdapter]):
    """A side network over frozen blocks feeds the last ones."""

    name = "sherl"
    config_cls, adapter_cls = SherlConfig, SherlAdapter
    summary = "a side network over frozen blocks feeds the last ones; no backward through the stack"
    paper = (
        "Diao et al. 2024, SHERL: Synthesizing High Accuracy and Efficient Memory for "
        "Resource-Limited Transfer Learning, ECCV, arXiv:2407.07523"
    )
    need = "little memory in training"
    recommended = "no backward through the frozen blocks: memory of a step does not grow with depth"
    needs_tuner = "hooks of the blocks feed it, which the tuner has"
    lacks = {
        Capability.MERGE: (
            "SHERL's side network is no update of a weight and cannot be merged; keep the adapter, "
            "or call unload() for the base model"
        ),
        Capability.NEW_TOKENS: "the model below its side network computes no gradients",
        Capability.MIXED_BATCH: "one side network at a time feeds the late blocks",
        Capability.FSDP1: of_two_stacks,
    }

    def targets(self, c: WrapContext[SherlConfig]) -> list[Target]:
        """The hosts; also adds the last norm to `modules_to_save` if it trains.

        Raises:
            InputError: other targets are given, or the adapter would train and the model leaves
                out blocks while it trains.
        """
        config, model = c.config, c.model
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
            if norm is None:
                raise InputError(
                    f"train_final_norm=True, and {type(model).__name__} has no norm behind its "
                    f"blocks ({stack}); leave it false"
                )
            config.modules_to_save = [*saved, *({norm} - set(saved))]
        drop = layer_drop(getattr(model, "config", None))
        is_dry_run = next(model.parameters()).is_meta  # before a file is loaded, too
        require(
            config.inference_mode or is_dry_run or not drop,
            f"the config of {type(model).__name__} has {drop}: in training it leaves out blocks at "
            "random, whose outputs the side network reads; set it to 0 in model.config",
        )
        widths, calls = block_widths(model, config.blocks), calls_of(model)
        for path in hosts:
            returned = calls.width_of(path) or widths[path]
            require(
                returned == widths[path],
                f"the blocks of {type(model).__name__} return {returned} numbers a token and their "
                f"sub-layers read {widths[path]}: it has several streams, and a side network reads "
                "one; choose another method, such as lora",
            )
            where = place_of(path)
            shape = calls.outputs.get(where, (1, 1, returned))
            taken = calls.inputs.get(where, shape)
            require(
                len(shape) == 3 and taken[:2] == shape[:2],
                f"the blocks of {type(model).__name__} at {path} take states of shape {[*taken]} "
                f"and return {[*shape]}: a side network reads [N, T, K] of one T; choose another "
                "method, such as lora",
            )
        return [
            Target(path, LayerShape(widths[path], widths[path]), is_block=True)
            for path in candidate_names(model)
            if path in hosts
        ]

    def settings(self, c: WrapContext[SherlConfig]) -> dict[str, Settings]:
        """Return the blocks that each side network reads, and the norm of the encoder's."""
        plan = plan_of(c.config, c.model)
        if len(plan.hosts) > 1:  # refused here if there is none, before the model changes
            place_of_argument(c.model.get_submodule(plan.hosts[0]), MEMORY)
        norms = [None, *(norm_kind(c.model.get_submodule(stack[0])) for stack in plan.stacks[1:])]
        return {
            host: {
                "sides": sides,
                "norm": norm,
                "in_decoder": len(plan.stacks) > 1 and norm is None,
            }
            for host, sides, norm in zip(plan.hosts, plan.sides, norms, strict=False)
        }

    def added(self, new: NewAdapters[SherlConfig, SherlAdapter]) -> None:
        """Register the hooks of the hosts, unless they are there."""
        plan = plan_of(new.config, new.model)
        # by their hosts, the adapters that share hooks; a name may have been of a deleted adapter
        known: dict[object, set[str]] = new.kept.setdefault("hosts", {})
        for names in known.values():
            names.discard(new.name)
        key = tuple(plan.hosts)
        if key not in known:
            known[key] = set()
            stacks = [BlockStack(path, new.model, new.context, known[key]) for path in plan.hosts]
            new.hooks += _hooks(plan, stacks, new.model)
        known[key].add(new.name)

    def joins(self, configs: Sequence[SherlConfig]) -> str:
        """Several adapters are never active together."""
        return "one side network at a time feeds the late blocks; activate one of them"

    @torch.no_grad()
    def heat_maps(self, t: TrainContext[SherlConfig, SherlAdapter]) -> list[HeatMap]:
        """Return the shares of the features in the last training batch; none before training."""
        series = t.context.series.get(SIZES, {})
        shares: dict[str, dict[str, float]] = {}
        for host, adapter in t.adapters:
            sizes = series.get(f"{host}.{adapter.info.adapter_name}")
            if sizes is not None:
                features = ["input", *map(str, adapter.sides)]
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


def _hooks(plan: SherlLayout, readers: list[BlockStack], model: nn.Module) -> list[RemovableHandle]:
    """Register the hooks that feed the side networks, and return their handles."""
    get, hooks = model.get_submodule, []
    main, *encoders = readers
    for reader, stack in zip(readers, plan.stacks, strict=False):
        hooks.append(get(stack[0]).register_forward_pre_hook(reader.start, with_kwargs=True))
        end = stack.index(reader.path)
        for i, path in enumerate(stack[: end + (reader is not main)]):
            collect = Collect(reader, i, ends=i == end)
            hooks.append(get(path).register_forward_hook(collect))
    alone = (get(stack[0]) for stack in plan.stacks[len(readers) :])  # an encoder
    hooks += [block.register_forward_pre_hook(main.cut, with_kwargs=True) for block in alone]
    for i, path in enumerate(plan.stacks[0][plan.late :]):
        block, encoder = get(path), encoders[0] if encoders else None
        feed = SideFeed(block, main, encoder, is_host=i == 0)
        hooks.append(block.register_forward_pre_hook(feed, with_kwargs=True))
    return hooks
