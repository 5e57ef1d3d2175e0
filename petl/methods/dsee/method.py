"""The method DSEE: positions of the entries, pruning, files.

Shapes: I in, O out, N entries.
"""

import logging
from functools import partial
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from petl.core.layers.layer import AdapterLayer
from petl.core.method import (
    AdapterSet,
    Method,
    NewAdapters,
    Settings,
    Target,
    Tensors,
    TrainContext,
    WrapContext,
    linear_target,
    linear_targets,
)
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.model.targets import matched_names
from petl.core.parameters import quantization_of
from petl.core.register import register
from petl.core.support import BASES, Capability
from petl.core.tuners.asking import AskingTuner
from petl.errors import InputError, UnsupportedError
from petl.methods.dsee.adapter import ALONE, DseeAdapter
from petl.methods.dsee.config import DseeConfig, resolve_lists
from petl.methods.dsee.prune import Pruning, heads_of, moves, sparsity
from petl.methods.dsee.support import greedy_positions
from petl.ops.masks import all_kept
from petl.ops.positions import generator_of, random_positions
from petl.ops.sparse import largest_entries
from petl.system import collectives as distributed
from petl.system.progress import Pass

logger = logging.getLogger(__name__)
FLAT = (
    "weights and heads are pruned by whole tensors after a step, and FSDP1 leaves each process "
    "flat parts; leave prune_step null, and prune the saved adapter without FSDP1"
)
QUANTIZED = (
    "dsee: cannot prune a quantised base, whose single weights cannot be set to zero; load it in "
    "bf16, or leave prune_step null and train the update alone"
)
MASK = "mask"  # the name of a tensor that a file may lack
TOTAL = "total"  # key of the length of the run
Adapters = AdapterSet[DseeConfig, DseeAdapter]
Training = TrainContext[DseeConfig, DseeAdapter]


@register
class Dsee(Method[DseeConfig, DseeAdapter]):
    """A low-rank update with a few free entries; then the base is pruned by it."""

    name = "dsee"
    config_cls, adapter_cls = DseeConfig, DseeAdapter
    summary = (
        "a low-rank update with a few free entries; then weights or heads of the base are "
        "pruned by what was learned"
    )
    paper = (
        "Chen et al. 2023, DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained "
        "Language Models, ACL, arXiv:2111.00160"
    )
    need = "a pruned model"
    by_position = True
    charts = (("sparsity", "Sparsity", "share of the adapted weights to prune"),)
    lacks = {
        Capability.LORA_EXPORT: (
            "its update alone is a LoRA, of rank r + num_sparse, but the weights that it prunes "
            "are none; `petl merge` writes the pruned model"
        ),
        Capability.ADAMR: "",  # masks change, and no trained tensor
        Capability.EXPERTS: "",
        **dict.fromkeys(
            BASES,
            lambda config: QUANTIZED if config.prune_step is not None else "",
        ),
        Capability.MIXED_BATCH: lambda config: ALONE if config.prune_step is not None else "",
        Capability.FSDP1: lambda config: FLAT if config.prune_step is not None else "",
    }
    # transformers puts the tensors into the layers without a call of `_load_from_state_dict`
    needs_tuner = "its layers would not know whether their weights are pruned"
    optional_tensors = (MASK,)

    def calibrate(self, c: WrapContext[DseeConfig]) -> None:
        """Choose the positions from the weights, also with a config that was read from a file."""
        c.config.is_saved = False

    # Targets and positions

    def targets(self, c: WrapContext[DseeConfig]) -> list[Target]:
        """Resolve both lists of modules; `target_modules` is their union then."""
        if c.config.target_modules is None:
            c.config.target_modules = DseeConfig.target_modules
        experts = [target for target in linear_targets(c, "") if target.stack]
        resolve_lists(c.config, c.model)
        return [linear_target(c, path) for path in matched_names(c.config, c.model)] + experts

    def settings(self, c: WrapContext[DseeConfig]) -> dict[str, Settings]:
        """Return for each module whether it has an update."""
        targets = c.targets.keys() - set(c.config.only_masked or ())
        heads_of(c.config, c.model, c.shapes, targets)  # refuses before anything is changed
        return {key: {"is_target": key in targets} for key in c.targets}

    def added(self, new: NewAdapters[DseeConfig, DseeAdapter]) -> None:
        """Unless a file follows, choose the positions of the entries."""
        if not new.config.is_saved:
            choose_positions(new)

    def released(self, idle: Adapters) -> None:
        """Free the memory of their pruned weights."""
        for adapter in idle.adapters.values():
            adapter.forget()

    # Pruning

    def is_idle(self, t: Training) -> bool:
        """True if no active adapter prunes after a step."""
        return all(config.prune_step is None for config in t.configs)

    def begin(self, t: Training) -> None:
        """Take the length of the training, and check that the weights will be pruned in it.

        Raises:
            InputError: `prune_step` is after the end, or a share of an unknown length.
            UnsupportedError: as `prune_base`.
        """
        t.kept[TOTAL] = t.total
        for config in (adapters.config for adapters in t.trained):
            if config.step_to_prune(t.total) is not None:
                check_prunable(t)
            elif config.prunes:
                logger.warning(
                    "dsee: nothing is pruned in this training, since prune_step is null: set it, "
                    "or call petl.methods.dsee.prune_base(model)"
                )

    def after_step(self, t: Training) -> None:
        """Prune after step `prune_step`.

        Raises:
            InputError: `prune_step` is a share, and the length of the training is unknown.
        """
        total = t.kept.get(TOTAL)
        if any(each.config.step_to_prune(total) == t.step for each in t.trained):
            prune(t)

    def state(self, t: Training) -> Tensors:
        """Return nothing: the adapter file has the masks."""
        return {}

    def figures(self, t: Training) -> dict[str, float]:
        """Return the figures of `sparsity`; empty while nothing is pruned."""
        for adapters in t.active:
            if any(adapter.pruned for adapter in adapters.adapters.values()):
                return sparsity(_layers(adapters))
        return {}

    def metrics(self, t: Training) -> dict[str, float]:
        """Return the share of pruned weights, once there are any."""
        found = self.figures(t)
        return {"sparsity": found["sparsity"]} if found else {}

    def heat_maps(self, t: Training) -> list[HeatMap]:
        """Where weights are pruned."""
        shares = {key: 100 * adapter.pruned / adapter.size for key, adapter in t.adapters}
        if not any(shares.values()):
            return []
        meaning = "The share of the pretrained weights of a module that are set to zero."
        title, unit = "DSEE: pruned weights", "% of the weights"
        return of_layers(t.model, shares, "pruned_weights", title, unit, meaning)

    # Files

    def pack(self, saved: Adapters, tensors: Tensors) -> Tensors:
        """Leave the masks out until there is a zero in one of them."""
        # a plan, on the meta device, is about the file at the end of the run
        will_prune, own = saved.config.prune_step is not None, saved.adapters.values()
        if any(a.pruned or (will_prune and a.mask.is_meta) for a in own):
            return tensors
        masks = f".{saved.name}.{MASK}"
        return {key: tensor for key, tensor in tensors.items() if not key.endswith(masks)}

    def unpack(self, saved: Adapters, tensors: Tensors) -> Tensors:
        """Without masks in the file, nothing is pruned."""
        keys = {path: saved.key(path, MASK) for path in saved.adapters}
        if any(key in tensors for key in keys.values()):
            return tensors  # some missing ones are an error
        return {**tensors, **{k: all_kept(saved.adapters[p].size) for p, k in keys.items()}}


def prune_base(model: PeftModel) -> dict[str, float]:
    """Set base weights to zero, by the fields of the active adapter and by its values of now.

    No gradients, and no base weight changes: masks do. Called again, it only adds zeros, and with
    the same fields none. With several processes all of them call it.

    Args:
        model: wrapped with DSEE.

    Returns:
        The figures of `sparsity`.

    Raises:
        InputError: the fields name nothing to prune, or an adapter is merged.
        UnsupportedError: several adapters are active, or the base is quantized.
    """
    return prune(cast(AskingTuner, model.base_model).context_of_training())


def prune(t: Training) -> dict[str, float]:
    """Prune by the active adapter; see `prune_base`."""
    adapters = check_prunable(t)
    config, placed = adapters.config, _layers(adapters)
    by_delta = config.prune_mode == "delta" and config.target_prune_ratio > 0
    if (by_delta or config.prune_heads) and not moves(placed):
        logger.warning(
            "dsee: the update is 0 everywhere, so that the choice of what to prune by it is "
            "arbitrary; train before pruning, or set prune_mode=weight"
        )
    shapes = {key: adapter.shape for key, adapter in adapters.adapters.items()}
    targets = {key for key, adapter in adapters.adapters.items() if adapter.is_target}
    Pruning(config, placed, heads_of(config, t.model, shapes, targets)).apply()
    figures = sparsity(placed)
    shares = ", ".join(
        f"{100 * value:.1f} % of the weights of {words}"
        for key, words in (
            ("target_sparsity", "the targets"),
            ("prune_modules_sparsity", "prune_modules"),
        )
        if (value := figures.get(key)) is not None
    )
    logger.info(
        "dsee: pruned %s; %s bytes packed, with update and mask, of %s",
        shares,
        f"{figures['packed_bytes']:,}",
        f"{figures['dense_bytes']:,}",
    )
    return figures


def check_prunable(t: Training) -> Adapters:
    """Return the adapters by which to prune.

    Raises:
        InputError: the fields name nothing to prune, or an adapter is merged.
        UnsupportedError: several adapters are active, or the base is quantized.
    """
    if len(t.active) != 1:
        raise UnsupportedError(
            f"dsee: {len(t.active)} adapters are active, {', '.join(t.names) or 'none'}, and a "
            "mask belongs to one; activate the one by whose update to prune"
        )
    (adapters,) = t.active
    if not adapters.config.prunes:
        raise InputError(
            f"dsee: there is nothing to prune for adapter {adapters.name!r}: set prune_ratio (of "
            "prune_modules), target_prune_ratio or prune_heads"
        )
    layers = [adapter.info.layer for adapter in adapters.adapters.values()]
    if quantization_of(t.model) or any(layer.quantization_backend for layer in layers):
        raise UnsupportedError(QUANTIZED)
    merged = [layer for layer in layers if layer.merged_adapters]
    if merged:
        raise InputError(
            f"dsee: adapter {merged[0].merged_adapters[0]!r} is merged into the weights; call "
            "unmerge_adapter() before pruning"
        )
    return adapters


def choose_positions(new: Adapters) -> None:
    """Choose the positions on the complete weights, each layer in one process."""
    placed, config = _layers(new), new.config
    found = {key: pair for key, pair in placed.items() if pair[1].is_target}
    weights = {key: layer.get_base_layer().weight for key, (layer, _) in found.items()}
    # a dry run, or a model that is loaded later
    is_meta = any(t.is_meta for t in (*weights.values(), *(a.mask for _, a in found.values())))
    if is_meta or not config.num_sparse:
        return
    with Pass("choosing entries", len(found), unit="layers", quiet=True) as shown:

        def make(key: str) -> Tensor:
            layer, _ = found[key]
            weight = distributed.to_full(layer.get_base_weight())
            weight = weight.t() if layer.fan_in_fan_out else weight
            indices = positions_of(weight, config, key).cpu()
            shown.advance()
            return indices

        # putting shards together is collective, so that all processes do so for each layer
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            chosen = [make(key) for key in found]
        else:
            chosen = distributed.shared_out([partial(make, key) for key in found])
    for (_, adapter), indices in zip(found.values(), chosen, strict=True):
        adapter.start(indices)


def _layers(adapters: Adapters) -> dict[str, tuple[AdapterLayer, DseeAdapter]]:
    return {key: (adapter.info.layer, adapter) for key, adapter in adapters.adapters.items()}


def positions_of(weight: Tensor, config: DseeConfig, key: str) -> Tensor:
    """Return the positions [N] of the entries of the module at path `key`, of weight [O, I]."""
    count, generator = config.num_sparse, generator_of(config.init_seed, key)
    weight = weight.detach().float().contiguous()
    if config.sparse_init == "random":
        return random_positions(count, weight.numel(), generator)
    if config.sparse_init == "magnitude":
        return largest_entries(weight, count, torch.int64)
    return greedy_positions(weight, count, config.decomp_rank or config.r, generator)
