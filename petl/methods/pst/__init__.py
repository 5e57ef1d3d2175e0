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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from petl.core.layers.layer import weight_of
from petl.core.method import AdapterSet, Method, Tensors, TrainContext
from petl.core.model.heat_map import HeatMap, of_layers
from petl.core.register import register
from petl.core.spec.checks import check_rank
from petl.core.spec.config import MethodConfig, config_field, require
from petl.core.support import BASES, Capability
from petl.core.types import Fields, Record
from petl.errors import InputError
from petl.methods.pst.adapter import ALONE, PstAdapter
from petl.methods.pst.pruned import PruningFactors
from petl.ops.masks import keep_largest, unpack_mask
from petl.system.collectives import to_full

__all__ = ["Pst", "PstAdapter", "PstConfig"]

FLAT = (
    "a mask that is saved is made of whole weights between two steps, and FSDP1 leaves each "
    "process flat parts; set save_mask=false"
)
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

    def to_dict(self) -> Record:
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

    def sized(self, size: int) -> Fields:
        """Return both ranks, in proportion."""
        return {"r": size, "mask_r": max(1, round(size * self.mask_r / self.r))}


@register
class Pst(Method[PstConfig, PstAdapter]):
    """Weights move by a low-rank product and are pruned by low-rank scores."""

    name = "pst"
    config_cls, adapter_cls = PstConfig, PstAdapter
    summary = (
        "weights move by a low-rank product and are pruned by low-rank scores while they train"
    )
    paper = (
        "Li et al. 2022, Parameter-Efficient Sparsity for Large Language Models Fine-Tuning, "
        "IJCAI, arXiv:2205.11005"
    )
    need = "a pruned model"
    recommended = "trains sparsity with as few parameters as LoRA; merges into weights with zeros"
    lr = 3e-4
    by_position = True
    charts = (
        ("sparsity", "Sparsity", "share of the adapted weights to prune"),
        ("pruned_share", "Changes of the mask", "share of weights pruned or restored"),
    )
    lacks = {
        Capability.LORA_EXPORT: (
            "it prunes the base weights, which no update of low rank does; `petl merge` writes the "
            "pruned model"
        ),
        Capability.ADAMR: "",  # masks change, and no trained tensor
        **dict.fromkeys(BASES, DENSE),
        Capability.MIXED_BATCH: ALONE,
        Capability.FSDP1: lambda config: FLAT if config.save_mask else "",
    }
    # transformers puts the tensors into the layers without a call of `_load_from_state_dict`
    needs_tuner = "its layers would not know how many of their weights are pruned"

    def released(self, idle: AdapterSet[PstConfig, PstAdapter]) -> None:
        """Free the memory of their pruned weights."""
        for adapter in idle.adapters.values():
            adapter._dense = None

    def begin(self, t: TrainContext[PstConfig, PstAdapter]) -> None:
        """Take the length of the training, if the config does not have it, and start it.

        Raises:
            InputError: the length is unknown.
        """
        for adapters in t.trained:
            config = adapters.config
            if config.total_step == config.set_by_trainer and t.total is not None:
                config.total_step = config.set_by_trainer = t.total
            config.check_total()
            for adapter in adapters.adapters.values() if t.step == 0 else ():
                adapter.begin()

    def after_step(self, t: TrainContext[PstConfig, PstAdapter]) -> None:
        """Set the number of pruned entries of each layer.

        Raises:
            InputError: `total_step` is null.
        """
        for adapters in t.trained:
            config = adapters.config
            config.check_total()
            is_due = t.step % config.mask_interval == 0 or t.step == config.total_step
            share = sparsity_after(t.step, config)
            for adapter in adapters.adapters.values():
                adapter.end_step(int(adapter.size * share) if is_due else None)
                if is_due and config.save_mask:
                    # all processes take part, one layer at a time
                    factors = PruningFactors(*map(to_full, adapter.factors_of_pruning))
                    adapter.save_mask(to_full(weight_of(adapter.info.layer)), factors)

    def state(self, t: TrainContext[PstConfig, PstAdapter]) -> Tensors:
        """Return masks that hold for several steps, by module and adapter."""
        return {
            f"{key}.{adapter.info.adapter_name}.mask": packed
            for key, adapter in t.adapters
            if (packed := adapter.standing_mask()) is not None
        }

    def load_state(
        self, t: TrainContext[PstConfig, PstAdapter], state: Mapping[str, Tensor]
    ) -> None:
        """Restore what `state` returned.

        Raises:
            InputError: the state is of other modules or adapters, or has another number of entries.
        """
        left = dict(state)
        for key, adapter in t.adapters:
            adapter.load_standing_mask(left.pop(f"{key}.{adapter.info.adapter_name}.mask", None))
        if left:
            raise InputError(
                f"the training state has {min(left)}, which this model does not have; resume with "
                "the model and targets of that run"
            )

    def metrics(self, t: TrainContext[PstConfig, PstAdapter]) -> dict[str, float]:
        """Return the share of pruned weights, and the share that changed side at the last mask."""
        own = [adapter for each in t.trained for adapter in each.adapters.values()]
        size = sum(adapter.size for adapter in own)
        if not size:
            return {}
        changed = [adapter.num_changed().to(own[0].U.device) for adapter in own]
        return {
            "sparsity": sum(adapter.pruned for adapter in own) / size,
            "pruned_share": float(torch.stack(changed).sum()) / size,
        }

    def heat_maps(self, t: TrainContext[PstConfig, PstAdapter]) -> list[HeatMap]:
        """Where weights are pruned, by how much the choice differs from that by magnitude."""
        shares: dict[str, float] = {}
        spared: dict[str, float] = {}
        for key, adapter in t.adapters:
            shares[key] = 100 * adapter.pruned / adapter.size
            share = spared_by_magnitude(adapter)
            if share is not None:
                spared[key] = 100 * share
        return [
            *of_layers(
                t.model, shares, "pruned_weights", "PST: pruned weights", "% of the weights"
            ),
            *of_layers(
                t.model,
                spared,
                "pruned_by_score",
                "PST: pruned weights that pruning by magnitude would keep",
                "% of the pruned weights",
                "Pruning by magnitude takes the smallest entries of the pretrained weight, as many "
                "as here. 0: the training changed nothing about which weights are pruned.",
            ),
        ]


def spared_by_magnitude(adapter: PstAdapter) -> float | None:
    """Return the share of the pruned entries that pruning W by magnitude would keep.

    None if nothing is pruned or the weights are sharded.
    """
    layer = adapter.info.layer
    weight = weight_of(layer)
    sharded = any(isinstance(t, DTensor) for t in (weight, *adapter.factors_of_pruning))
    if not adapter.pruned or sharded or layer.merged_adapters:
        return None
    packed, _ = adapter.mask_now(weight)
    assert packed is not None
    kept = unpack_mask(packed, tuple(weight.shape))
    by_magnitude = keep_largest(weight.detach().float().abs(), adapter.pruned)
    return float((by_magnitude & ~kept).sum()) / adapter.pruned


# The share of weights to prune after each optimizer step


def sparsity_after(step: int, config: Any) -> float:
    """Return the share of weights to prune after optimizer step `step`, from 0.

    Cubic, as in Zhu and Gupta 2017, "To Prune, or Not to Prune" (arXiv:1710.01878).
    """
    total, first, last = config.total_step, config.initial_sparsity, config.final_sparsity
    start, end = config.initial_warmup * total, total - config.final_warmup * total
    if step <= start:
        return first
    if step > end:
        return last
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3
