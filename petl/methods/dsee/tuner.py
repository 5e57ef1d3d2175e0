"""The tuner of DSEE: positions of the entries, pruning, files.

Shapes: I in, O out, N entries.
"""

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from petl.core.layers.layer import AdapterLayer, LayerShape
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.parameters import quantization_of
from petl.core.register import register
from petl.core.support import BASES, Capability
from petl.core.switching.tuner import layers_of
from petl.core.tuners.base import updated
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError, UnsupportedError
from petl.methods.dsee.adapter import ALONE, DseeAdapter
from petl.methods.dsee.config import DseeConfig, resolve_lists
from petl.methods.dsee.prune import Heads, Pruning, heads_of, moves, sparsity
from petl.methods.dsee.support import greedy_positions
from petl.ops.masks import all_kept
from petl.ops.positions import generator_of, random_positions
from petl.ops.sparse import largest_entries
from petl.system import collectives as distributed
from petl.system.progress import Pass

logger = logging.getLogger(__name__)
QUANTIZED = (
    "dsee: cannot prune a quantised base, whose single weights cannot be set to zero; load it in "
    "bf16, or leave prune_step null and train the update alone"
)
MASK = "mask"  # the name of a tensor that a file may lack


@register(
    "dsee",
    summary="a low-rank update with a few free entries; then weights or heads of the base are "
    "pruned by what was learned",
    need="a pruned model",
    paper="Chen et al. 2023, DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained "
    "Language Models, ACL, arXiv:2111.00160",
)
class DseeModel(MethodTuner):
    """Tuner of `DseeConfig`."""

    config_cls, adapter_cls = DseeConfig, DseeAdapter
    by_position = True
    lacks = {
        Capability.LORA_EXPORT: (
            "its update alone is a LoRA, of rank r + num_sparse, but the weights that it prunes "
            "are none; `petl merge` writes the pruned model"
        ),
        Capability.ADAMR: "",  # masks change, and no trained tensor
        **dict.fromkeys(
            BASES,
            lambda config: QUANTIZED if config.prune_step is not None else "",
        ),
        Capability.MIXED_BATCH: lambda config: ALONE if config.prune_step is not None else "",
    }
    # transformers puts the tensors into the layers without a call of `_load_from_state_dict`
    needs_tuner = "its layers would not know whether their weights are pruned"
    optional_tensors = (MASK,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.heads: dict[str, list[Heads]] = {}  # to prune, by adapter name
        self.total_steps: int | None = None
        super().__init__(*args, **kwargs)

    @staticmethod
    def on_wrap(model: nn.Module, config: DseeConfig, calibration: Any) -> None:
        """Choose the positions from the weights, also with a config that was read from a file."""
        config.is_saved = False

    # Targets and positions

    def choose_targets(self, config: DseeConfig, model: nn.Module) -> None:
        """Resolve both lists of modules; `target_modules` is their union then."""
        if config.target_modules is None:
            config.target_modules = DseeConfig.target_modules
        super().choose_targets(config, model)
        resolve_lists(config, model)

    def layer_settings(
        self, config: DseeConfig, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Return for each module whether it has an update."""
        masked = set(config.only_masked or ())
        targets = shapes.keys() - masked
        heads_of(config, model, shapes, targets)  # refuses before anything is changed
        return {key: {"is_target": key in targets} for key in shapes}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject the adapter; unless a file follows, choose the positions of its entries."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self._config(adapter_name)
        placed = self._placed(adapter_name)
        shapes = {key: adapter.shape for key, (_, adapter) in placed.items()}
        targets = {key for key, (_, adapter) in placed.items() if adapter.is_target}
        self.heads[adapter_name] = heads_of(config, model, shapes, targets)
        if not config.is_saved:
            self._choose_positions(config, placed)

    def _choose_positions(
        self, config: DseeConfig, placed: Mapping[str, tuple[AdapterLayer, DseeAdapter]]
    ) -> None:
        """Choose the positions on the complete weights, each layer in one process."""
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

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter; the memory of the others' pruned weights is freed."""
        super().set_adapter(adapter_name, inference_mode)
        active = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in layers_of(self.model):
            for _, adapter in layer.pick([n for n in layer.adapters if n not in active]):
                if isinstance(adapter, DseeAdapter):  # pyra has adapters beside those of its inner
                    adapter.forget()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        super().delete_adapter(adapter_name)
        self.heads.pop(adapter_name, None)

    # Pruning

    @property
    def needs_updates(self) -> bool:
        """True if an active adapter prunes after a step."""
        return any(self._config(name).prune_step is not None for name in self.active_adapters)

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Take the length of the training, and check that the weights will be pruned in it.

        Raises:
            InputError: `prune_step` is after the end, or a share of an unknown length.
            UnsupportedError: as `prune`.
        """
        self.total_steps = total_steps
        for name in self._trained():
            config = self._config(name)
            if config.step_to_prune(total_steps) is not None:
                self._check_prunable(self._one_active())
            elif config.prunes:
                logger.warning(
                    "dsee: nothing is pruned in this training, since prune_step is null: set it, "
                    "or call model.base_model.prune()"
                )

    def update_and_allocate(self, step: int, optimizer: Any = None) -> None:
        """Prune after step `prune_step`; call it after `optimizer.step()`.

        Args:
            step: completed optimizer steps, from 1.
            optimizer: not used: no shape changes.

        Raises:
            InputError: `prune_step` is a share, and the length of the training is unknown.
        """
        updated(self)
        if any(
            self._config(name).step_to_prune(self.total_steps) == step for name in self._trained()
        ):
            self.prune()

    def prune(self) -> dict[str, float]:
        """Set base weights to zero, by the fields of the active adapter and by its values of now.

        No gradients, and no base weight changes: masks do. Called again, it only adds zeros, and
        with the same fields none. With several processes all of them call it.

        Returns:
            The figures of `sparsity`.

        Raises:
            InputError: the fields name nothing to prune, or an adapter is merged.
            UnsupportedError: several adapters are active, or the base is quantized.
        """
        name = self._one_active()
        self._check_prunable(name)
        config = self._config(name)
        placed = self._placed(name)
        by_delta = config.prune_mode == "delta" and config.target_prune_ratio > 0
        if (by_delta or config.prune_heads) and not moves(placed):
            logger.warning(
                "dsee: the update is 0 everywhere, so that the choice of what to prune by it is "
                "arbitrary; train before prune(), or set prune_mode=weight"
            )
        Pruning(config, placed, self.heads[name]).apply()
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

    def _one_active(self) -> str:
        names = list(self.active_adapters)
        if len(names) != 1:
            raise UnsupportedError(
                f"dsee: {len(names)} adapters are active, {', '.join(names) or 'none'}, and a mask "
                "belongs to one; activate the one by whose update to prune"
            )
        return names[0]

    def _check_prunable(self, name: str) -> None:
        config = self._config(name)
        if not config.prunes:
            raise InputError(
                f"dsee: prune() has nothing to prune for adapter {name!r}: set prune_ratio (of "
                "prune_modules), target_prune_ratio or prune_heads"
            )
        layers = [layer for layer, _ in self._placed(name).values()]
        if quantization_of(self.model) or any(layer.quantization_backend for layer in layers):
            raise UnsupportedError(QUANTIZED)
        merged = [layer for layer in layers if layer.merged_adapters]
        if merged:
            raise InputError(
                f"dsee: adapter {merged[0].merged_adapters[0]!r} is merged into the weights; call "
                "unmerge_adapter() before prune()"
            )

    def figures(self) -> dict[str, float]:
        """Return the figures of `sparsity`; empty while nothing is pruned."""
        for name in self.active_adapters:
            placed = self._placed(name)
            if any(adapter.pruned for _, adapter in placed.values()):
                return sparsity(placed)
        return {}

    def series(self) -> dict[str, float]:
        """Return the share of pruned weights, once there are any."""
        found = self.figures()
        return {"sparsity": found["sparsity"]} if found else {}

    def heat_maps(self) -> list[HeatMap]:
        """Where weights are pruned, and the changes of the weights."""
        shares = {
            key: 100 * adapter.pruned / adapter.size
            for name in self.active_adapters
            for key, (_, adapter) in self._placed(name).items()
        }
        if not any(shares.values()):
            return super().heat_maps()
        meaning = "The share of the pretrained weights of a module that are set to zero."
        title, unit = "DSEE: pruned weights", "% of the weights"
        pruned = of_layers(self.model, shares, "pruned_weights", title, unit, meaning)
        return [*pruned, *super().heat_maps()]

    def training_state(self) -> dict[str, Tensor]:
        """Return nothing: the adapter file has the masks."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: there is no state besides the adapter."""

    def _trained(self) -> Iterator[str]:
        """Yield the names of active adapters that train."""
        for name in self.active_adapters:
            adapters = (adapter for _, adapter in self._placed(name).values())
            if any(p.requires_grad for adapter in adapters for p in adapter.parameters()):
                yield name

    def _config(self, name: str) -> DseeConfig:
        return cast(DseeConfig, self.peft_config[name])

    def _placed(self, name: str) -> dict[str, tuple[AdapterLayer, DseeAdapter]]:
        """Return layer and adapter by path, of the adapter called `name`."""
        return {
            adapter.info.key: (layer, adapter)
            for layer in layers_of(self.model)
            for _, adapter in layer.pick([name])
            if isinstance(adapter, DseeAdapter)
        }

    # Files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select the tensors to save; masks only once there is a zero in one of them."""
        tensors = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        adapters = [
            a
            for layer in layers_of(model)
            for _, a in layer.pick([adapter_name])
            if isinstance(a, DseeAdapter)
        ]
        # a plan, on the meta device, is about the file at the end of the run
        will_prune = config.prune_step is not None
        if any(a.pruned or (will_prune and a.mask.is_meta) for a in adapters):
            return tensors
        masks = f".{adapter_name}.{MASK}"
        return {key: tensor for key, tensor in tensors.items() if not key.endswith(masks)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors of a file; without masks in it, nothing is pruned.

        Raises:
            InputError: as for other methods; some masks are missing.
        """
        tail = f"{cls.prefix}adapters.{adapter_name}.{MASK}"
        sizes = {
            cls._remove_adapter_name_from_key(key, adapter_name): adapter.size
            for key in model.state_dict()
            if key.endswith(tail)
            for adapter in [model.get_submodule(key.removesuffix(f".{MASK}"))]
        }
        there = {key for key in state_dict if key.endswith(f"{cls.prefix}adapters.{MASK}")}
        if not there:
            state_dict = {**state_dict, **{key: all_kept(size) for key, size in sizes.items()}}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def positions_of(weight: Tensor, config: DseeConfig, key: str) -> Tensor:
    """Return the positions [N] of the entries of the module at path `key`, of weight [O, I]."""
    count, generator = config.num_sparse, generator_of(config.init_seed, key)
    weight = weight.detach().float().contiguous()
    if config.sparse_init == "random":
        return random_positions(count, weight.numel(), generator)
    if config.sparse_init == "magnitude":
        return largest_entries(weight, count, torch.int64)
    return greedy_positions(weight, count, config.decomp_rank or config.r, generator)
