"""PST: prunes the weights while they move, with low-rank updates and low-rank scores.

Li, Luo, Tan, Wang, Huang, Li, Bai 2022, "Parameter-Efficient Sparsity for Large Language Models
Fine-Tuning", IJCAI (arXiv:2205.11005). The score of a weight is its magnitude after the update plus
a low-rank product plus a row and a column vector; the smallest scores are pruned in each layer, the
same share everywhere, which rises over the run. The result is one sparse weight per layer. The
arithmetic is in petl/methods/pst/pruned.py.

    schedule.py    the share of weights to prune after each step
    adapter.py     factors, mask and products of a layer
    compiled.py    the layer as a custom operator, for torch.compile

Shapes: I in, O out, R rank of the update, Q rank of the scores.

Where we depart from the authors' code (AliceMind, S4/PST): the number of pruned entries is exact,
also among equal scores, and saved with the adapter (there a threshold that prunes ties, and an
attribute that resuming loses); the gradient also flows through |W'| in the score; nothing of the
size of the weight is kept for backward but a bit for each entry; no weight decay on the factors;
the head trains.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from petl.core.layers.layer import AdapterLayer, weight_of
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.register import register
from petl.core.spec.checks import check_rank
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.support import BASES, Capability
from petl.core.switching.tuner import layers_of
from petl.core.tuners.base import updated
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError
from petl.methods.pst.adapter import ALONE, PstAdapter
from petl.methods.pst.pruned import PruningFactors
from petl.methods.pst.schedule import sparsity_after
from petl.ops.masks import keep_largest, unpack_mask
from petl.system.collectives import to_full

__all__ = ["PstAdapter", "PstConfig", "PstModel"]

DENSE = "pst prunes single base weights, which a quantized weight does not have; load it in bf16"


@dataclass
class PstConfig(MethodConfig):
    """Fields of PST."""

    r: int = config_field("rank of the update U V", 8, ge=1)
    mask_r: int = config_field("rank of the scores A B", 8, ge=1)
    beta: float = config_field("factor of the update; not divided by the rank", 1.0)
    alpha1: float = config_field("factor of A B in the scores; not divided by the rank", 1.0)
    alpha2: float = config_field("factor of the row and column vectors in the scores", 1.0)
    initial_sparsity: float = config_field(
        "share of the weights that is pruned at first, in [0, 1)", 0.0, ge=0, lt=1
    )
    final_sparsity: float = config_field(
        "share of the weights that is pruned in the end, in [0, 1)", 0.9, ge=0, lt=1
    )
    initial_warmup: float = config_field(
        "share of the run with the initial sparsity, from 0", 0.1, ge=0, le=1
    )
    final_warmup: float = config_field(
        "share of the run with the final sparsity, from 0", 0.3, ge=0, le=1
    )
    mask_interval: int = config_field("optimizer steps between new masks", 1, ge=1)
    total_step: int | None = config_field(
        "length of the training in optimizer steps; null: the trainer sets it", None, ge=1
    )
    save_mask: bool = config_field(
        "save the mask too, one bit for each weight; it then holds on loading", False
    )
    init_weights: bool = config_field(
        "false: all tensors start with small random values, for tests", True
    )

    def __post_init__(self) -> None:
        # the length that a trainer has set, which is not that of a further training
        self.set_by_trainer: int | None = None
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, without a length that a trainer has set."""
        is_chosen = self.total_step != self.set_by_trainer
        return {**super().to_dict(), "total_step": self.total_step if is_chosen else None}

    def check(self) -> None:
        """Raise InputError if the two warm-ups take more than the run."""
        first, last = self.initial_warmup, self.final_warmup
        require(
            first + last <= 1,
            f"initial_warmup={first:g} and final_warmup={last:g} are {first + last:g} of the run "
            "together; lower them to at most 1",
        )

    def check_total(self) -> None:
        """Raise InputError if the length of the training is unknown."""
        require(
            self.total_step is not None,
            "total_step must be set: pst prunes by the share of the run that is over; set it to "
            "the number of optimizer steps, or pass total_steps to attach_optimizer",
        )

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Warn about ranks above the widths of a layer."""
        check_rank(self, "r", shapes)
        check_rank(self, "mask_r", shapes)

    def sized(self, size: int) -> dict[str, Any]:
        """Return both ranks, in proportion."""
        return {"r": size, "mask_r": max(1, round(size * self.mask_r / self.r))}


@register(
    "pst",
    summary="weights move by a low-rank product and are pruned by low-rank scores while they train",
    need="a pruned model",
    recommended="trains sparsity with as few parameters as LoRA; merges into weights with zeros",
    paper="Li et al. 2022, Parameter-Efficient Sparsity for Large Language Models Fine-Tuning, "
    "IJCAI, arXiv:2205.11005",
    lr=3e-4,
)
class PstModel(MethodTuner):
    """Tuner of `PstConfig`."""

    config_cls, adapter_cls = PstConfig, PstAdapter
    by_position = True
    lacks = {
        Capability.LORA_EXPORT: (
            "it prunes the base weights, which no update of low rank does; `petl merge` writes the "
            "pruned model"
        ),
        Capability.ADAMR: "",  # masks change, and no trained tensor
        **dict.fromkeys(BASES, DENSE),
        Capability.MIXED_BATCH: ALONE,
    }
    # transformers puts the tensors into the layers without a call of `_load_from_state_dict`
    needs_tuner = "its layers would not know how many of their weights are pruned"

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter; the memory of the others' pruned weights is freed."""
        super().set_adapter(adapter_name, inference_mode)
        active = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in layers_of(self.model):
            for _, adapter in layer.pick([n for n in layer.adapters if n not in active]):
                if isinstance(adapter, PstAdapter):  # pyra has adapters beside those of its inner
                    adapter._dense = None

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Take the length of the training, if the config does not have it, and start it.

        Raises:
            InputError: the length is unknown.
        """
        for _, config, layers in self._trained():
            if config.total_step == config.set_by_trainer and total_steps is not None:
                config.total_step = config.set_by_trainer = total_steps
            config.check_total()
            for _, adapter in layers if start_step == 0 else ():
                adapter.begin()

    def update_and_allocate(self, step: int, optimizer: Any = None) -> None:
        """Set the number of pruned entries of each layer; call it after `optimizer.step()`.

        Args:
            step: completed optimizer steps, from 1.
            optimizer: not used.

        Raises:
            InputError: `total_step` is null.
        """
        updated(self)
        for _, config, layers in self._trained():
            config.check_total()
            is_due = step % config.mask_interval == 0 or step == config.total_step
            share = sparsity_after(step, config)
            for layer, adapter in layers:
                adapter.end_step(int(adapter.size * share) if is_due else None)
                if is_due and config.save_mask:
                    # all processes take part, one layer at a time
                    factors = PruningFactors(*map(to_full, adapter.factors_of_pruning))
                    adapter.save_mask(to_full(weight_of(layer)), factors)

    def series(self) -> dict[str, float]:
        """Return the share of pruned weights, and the share that changed side at the last mask."""
        adapters = [adapter for _, _, layers in self._trained() for _, adapter in layers]
        size = sum(adapter.size for adapter in adapters)
        if not size:
            return {}
        changed = [adapter.num_changed().to(adapters[0].U.device) for adapter in adapters]
        return {
            "sparsity": sum(adapter.pruned for adapter in adapters) / size,
            "pruned_share": float(torch.stack(changed).sum()) / size,
        }

    def heat_maps(self) -> list[HeatMap]:
        """Where weights are pruned, by how much the choice differs from that by magnitude."""
        shares: dict[str, float] = {}
        spared: dict[str, float] = {}
        for _, _, layers in self._of_active():
            for layer, adapter in layers:
                key = adapter.info.key
                shares[key] = 100 * adapter.pruned / adapter.size
                share = spared_by_magnitude(layer, adapter)
                if share is not None:
                    spared[key] = 100 * share
        return [
            *of_layers(
                self.model, shares, "pruned_weights", "PST: pruned weights", "% of the weights"
            ),
            *of_layers(
                self.model,
                spared,
                "pruned_by_score",
                "PST: pruned weights that pruning by magnitude would keep",
                "% of the pruned weights",
                "Pruning by magnitude takes the smallest entries of the pretrained weight, as many "
                "as here. 0: the training changed nothing about which weights are pruned.",
            ),
            *super().heat_maps(),
        ]

    def training_state(self) -> dict[str, Tensor]:
        """Return masks that hold for several steps, by module and adapter."""
        return {
            f"{adapter.info.key}.{name}.mask": packed
            for name, _, layers in self._of_active()
            for _, adapter in layers
            if (packed := adapter.standing_mask()) is not None
        }

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `training_state` returned.

        Raises:
            InputError: the state is of other modules or adapters, or has another number of entries.
        """
        left = dict(state)
        for name, _, layers in self._of_active():
            for _, adapter in layers:
                adapter.load_standing_mask(left.pop(f"{adapter.info.key}.{name}.mask", None))
        if left:
            raise InputError(
                f"the training state has {min(left)}, which this model does not have; resume with "
                "the model and targets of that run"
            )

    def _of_active(self) -> Iterator[tuple[str, Any, list[tuple[AdapterLayer, PstAdapter]]]]:
        """Yield name, config, and layers with their adapters, of each active adapter."""
        for name in self.active_adapters:
            layers = [
                (layer, adapter)
                for layer in layers_of(self.model)
                for _, adapter in layer.pick([name])
                if isinstance(adapter, PstAdapter)
            ]
            yield name, self.peft_config[name], layers

    def _trained(self) -> Iterator[tuple[str, Any, list[tuple[AdapterLayer, PstAdapter]]]]:
        """Yield the same without adapters that do not train."""
        for name, config, layers in self._of_active():
            trained = [(layer, a) for layer, a in layers if a.U.requires_grad]
            if trained:
                yield name, config, trained


def spared_by_magnitude(layer: AdapterLayer, adapter: PstAdapter) -> float | None:
    """Return the share of the pruned entries that pruning W by magnitude would keep.

    None if nothing is pruned or the weights are sharded.
    """
    weight = weight_of(layer)
    sharded = any(isinstance(t, DTensor) for t in (weight, *adapter.factors_of_pruning))
    if not adapter.pruned or sharded or layer.merged_adapters:
        return None
    packed, _ = adapter.mask_now(weight)
    assert packed is not None
    kept = unpack_mask(packed, tuple(weight.shape))
    by_magnitude = keep_largest(weight.detach().float().abs(), adapter.pruned)
    return float((by_magnitude & ~kept).sum()) / adapter.pruned
