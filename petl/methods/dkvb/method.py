"""The method DKVB: the head, the key phase, optimizer, metrics."""

import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from petl.core.masks import without_padding
from petl.core.method import (
    AdapterSet,
    Finish,
    Method,
    Target,
    Tensors,
    TrainContext,
    WrapContext,
    linear_target,
)
from petl.core.model.heat_map import HeatMap
from petl.core.model.modes import calibration_pass, forward
from petl.core.model.targets import matched_names
from petl.core.register import register
from petl.core.registry import no_calibration
from petl.core.spec.config import require
from petl.core.support import Capability
from petl.core.tuners.asking import AskingTuner
from petl.core.types import Calibration
from petl.errors import InputError
from petl.methods.dkvb.adapter import DkvbAdapter
from petl.methods.dkvb.config import (
    NO_MODULE,
    DkvbConfig,
    encoder_of,
    head_of,
    without_head_names,
)
from petl.methods.dkvb.keys import Keys, MeanCapture, nearest, start_keys, use_of
from petl.methods.dkvb.optimizer import ADAM_LR, SGD_LR, check_optimizer, make_optimizer
from petl.system.collectives import gathered

Training = TrainContext[DkvbConfig, DkvbAdapter]
logger = logging.getLogger(__name__)
BINS = 16  # columns of the map of uses; assumption


@register
class Dkvb(Method[DkvbConfig, DkvbAdapter]):
    """A classification head of frozen keys and trained values."""

    name = "dkvb"
    config_cls, adapter_cls = DkvbConfig, DkvbAdapter
    summary = "a classification head of frozen keys and trained values, for streams of new classes"
    paper = "Träuble et al. 2023, Discrete Key-Value Bottleneck, ICML, arXiv:2207.11240"
    need = "classes that arrive one after the other"
    recommended = "an update changes few values, so that earlier classes are not overwritten"
    lr = SGD_LR
    lr_by = ("optimizer", {"sparse_adam": ADAM_LR})
    lacks = {
        Capability.NEW_TOKENS: "its keys stay right only if the encoder stays as it is",
        Capability.MERGE: (
            "dkvb reads a table of values in place of the head and is no update of a weight; it "
            "cannot be merged: keep the adapter, or call unload() for the model with its own head"
        ),
    }
    capture_cls = MeanCapture
    charts = (
        ("keys_used", "Keys in use", "share of the keys that training has picked"),
        ("key_perplexity", "Perplexity of the keys", "keys of a codebook in even use"),
    )

    def needs_data(self, config: DkvbConfig) -> str:
        """The keys are learnt from data."""
        return "method 'dkvb'"

    def targets(self, c: WrapContext[DkvbConfig]) -> list[Target]:
        """Return the head, and take it out of what PEFT trains; with `pool=mean` it reads states.

        Raises:
            InputError: other modules are given, or the model has no head that is known.
        """
        config = c.config
        head, given = head_of(c.model), config.target_modules
        names = {given} if isinstance(given, str) else given
        require(
            given is None or set(names or ()) == {head},
            f"target_modules={given}: dkvb stands on the classification head, here {head!r}; leave "
            "it null",
        )
        config.target_modules = {head}
        others = without_head_names(config.modules_to_save)
        require(not others, f"modules_to_save={others}: dkvb trains no module; leave it null")
        config.modules_to_save = [NO_MODULE]
        source = encoder_of(c.model) if config.pool == "mean" else ""
        return [linear_target(c, path, source) for path in matched_names(config, c.model)]

    def calibrate(self, c: WrapContext[DkvbConfig]) -> Finish:
        """Return the key phase over the calibration data, for the wrapped model.

        Raises:
            InputError: there is no calibration, unless the model has shapes only.
        """
        calibration, has_weights = c.calibration, c.has_weights
        if has_weights and calibration is None:
            raise no_calibration("method 'dkvb'")

        def finish(wrapped: PeftModel) -> None:
            (name,) = wrapped.peft_config
            cast(DkvbConfig, wrapped.peft_config[name]).modules_to_save = None
            if has_weights and calibration is not None:
                learn_keys(wrapped, calibration, name)

        return finish

    def unpack(self, saved: AdapterSet[DkvbConfig, DkvbAdapter], tensors: Tensors) -> Tensors:
        """PEFT has read `modules_to_save` by now."""
        saved.config.modules_to_save = without_head_names(saved.config.modules_to_save) or None
        return tensors

    # Training

    def optimizer(self, t: Training) -> Optimizer:
        """Return the optimizer of the config, without momentum and weight decay."""
        return make_optimizer(t.configs[0].optimizer, t.groups)

    def begin(self, t: Training) -> None:
        """Check that the optimizer moves picked values only.

        Raises:
            InputError: it would move others.
        """
        own = [p for _, adapter in t.adapters for p in adapter.parameters()]
        check_optimizer(t.optimizer, own, t.configs[0].optimizer)
        for _, adapter in t.adapters:
            if not adapter.has_keys:
                name = adapter.info.adapter_name
                logger.warning(
                    "adapter %r of dkvb has random keys, which fit no data: call "
                    "petl.methods.dkvb.learn_keys(model, batches, %r) before training",
                    name,
                    name,
                )

    def state(self, t: Training) -> Tensors:
        """Return the uses of the keys, which the adapter file does not have."""
        return {f"{key}.{a.info.adapter_name}.uses": a.uses for key, a in t.adapters}

    def load_state(self, t: Training, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for key, adapter in t.adapters:
            adapter.uses.copy_(state[f"{key}.{adapter.info.adapter_name}.uses"])

    # Metrics

    def metrics(self, t: Training) -> dict[str, float]:
        """Return the fraction of keys that training has picked so far, and their perplexity."""
        uses = _uses(t)
        if uses is None:
            return {}
        used, perplexity = use_of(uses)
        return {"keys_used": used, "key_perplexity": perplexity}

    def heat_maps(self, t: Training) -> list[HeatMap]:
        """Return how evenly training has used the keys of each codebook; none before training."""
        uses = _uses(t)
        if uses is None:
            return []
        uses = uses.sort(-1, descending=True).values
        C, K = uses.shape
        bins = min(BINS, K)
        shares = uses / uses.sum(-1, keepdim=True).clamp(min=1)
        parts = torch.stack([part.sum(-1) for part in shares.tensor_split(bins, -1)], -1)
        ends = torch.arange(1, bins + 1).mul(100).div(bins).round().int().tolist()
        return [
            HeatMap(
                "key_use",
                "DKVB: how often training picks the keys of each codebook",
                "% of the picks of the codebook",
                [str(c) for c in range(C)],
                [f"{end}" for end in ends],
                (100 * parts).tolist(),
                "The keys of a codebook in decreasing order of use, in groups of equal size. Even "
                "rows are best: where the first group has nearly all picks, few keys do the work "
                "of the codebook, and classes share their values.",
                "codebook",
                "keys by use, up to this % of them",
            )
        ]


def _uses(t: Training) -> Tensor | None:
    """Return the uses on this process of the active adapter, [C, K]; None before training."""
    found = [adapter.uses for _, adapter in t.adapters]
    return found[0] if found and bool(found[0].any()) else None


# Key phase


@torch.no_grad()
def learn_keys(model: PeftModel, calibration: Calibration, adapter_name: str = "default") -> None:
    """Learn the keys of an adapter before it is trained, and log how many are used.

    `petl.wrap` calls it; an adapter that was added by `add_adapter` needs it, too. All processes
    must call it, each with its own part of the batches.

    Args:
        model: wrapped with DKVB.
        calibration: dicts of model inputs, whose labels are not read, of which the first
            `key_batches` are used; or a function that runs the model.
        adapter_name: the adapter.

    Raises:
        InputError: there are no batches, the head does not run, or its input is not finite.
    """
    tuner = cast(AskingTuner, model.base_model)
    config = cast(DkvbConfig, tuner.peft_config[adapter_name])
    (adapter,) = cast(Iterable[DkvbAdapter], tuner.placed[adapter_name].values())
    batches = _collected(tuner, calibration, adapter, config.key_batches)
    every = torch.cat([part for parts in gathered(batches) for part in parts] or [torch.empty(0)])
    if not len(every):
        raise InputError(
            "calibration has no rows for method 'dkvb': pass batches of model inputs, such as "
            "those of the training data"
        )
    broken = int((~every.isfinite().flatten(1).all(1)).sum())
    if broken:
        raise InputError(
            f"the head's input is not finite for {broken} of {len(every)} calibration rows: "
            "check the model and its inputs"
        )
    generator = torch.Generator().manual_seed(config.seed)
    device = adapter.keys.device
    start = start_keys(every, config.pairs, generator).to(device)
    keys = Keys(start, config.key_decay, config.dead, config.seed)
    for i in range(max(gathered(len(batches)))):
        keys.update(batches[i] if i < len(batches) else every[:0])
    adapter.keys.copy_(keys.keys)
    adapter.has_keys = True
    _log_use(every.to(device), adapter.keys)


def _log_use(pieces: Tensor, keys: Tensor) -> None:
    C, K, _ = keys.shape
    picked = nearest(pieces, keys).t()
    uses = torch.zeros(C, K, device=keys.device)
    uses.scatter_add_(1, picked, torch.ones_like(picked, dtype=uses.dtype))
    used, perplexity = use_of(uses)
    logger.info(
        "keys of dkvb, from %s pieces of each codebook: %.1f %% of %s are used, perplexity "
        "%.1f of %d",
        f"{len(pieces):,}",
        100 * used,
        f"{C * K:,}",
        perplexity,
        K,
    )


def _collected(
    tuner: AskingTuner, calibration: Calibration, adapter: DkvbAdapter, limit: int
) -> list[Tensor]:
    """Return the pieces of each of the first `limit` batches, on the CPU, [n, C, d]."""
    active = tuner.active_adapters
    tuner.set_adapter(adapter.info.adapter_name)
    batches: list[Tensor] = []
    try:
        with calibration_pass(tuner.model):
            if callable(calibration):
                adapter.collected = []
                calibration()
                batches = [pieces.cpu() for pieces in adapter.collected[:limit]]
            else:
                for batch in islice(iter(calibration), limit):
                    adapter.collected = []
                    forward(tuner.model, {k: v for k, v in batch.items() if k != "labels"})
                    no_rows = adapter.keys.new_empty(0, adapter.shape.in_features)
                    found = torch.cat(adapter.collected or [adapter.pieces(no_rows)])
                    # pieces of one token in a row, as without_padding takes them
                    tokens = without_padding(found.flatten(1), batch.get("attention_mask"))
                    batches.append(tokens.unflatten(1, found.shape[1:]).cpu())
    finally:
        adapter.collected = None
        tuner.set_adapter(active)
    return batches
