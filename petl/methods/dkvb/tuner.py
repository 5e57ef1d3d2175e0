"""The tuner of DKVB: injection, the key phase, optimizer, metrics."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from petl.core.layers.context import as_2d
from petl.core.layers.layer import LayerShape
from petl.core.method import Calibration
from petl.core.model.heat_map import HeatMap
from petl.core.model.modes import evaluation_mode
from petl.core.register import register
from petl.core.registry import no_calibration
from petl.core.spec.config import require
from petl.core.support import Capability
from petl.core.tuners.tuner import MethodTuner
from petl.errors import InputError
from petl.methods.dkvb.adapter import DkvbAdapter
from petl.methods.dkvb.config import (
    NO_MODULE,
    DkvbConfig,
    encoder_of,
    head_of,
    without_head_names,
)
from petl.methods.dkvb.keys import Keys, nearest, start_keys, use_of
from petl.methods.dkvb.optimizer import ADAM_LR, SGD_LR, check_optimizer, make_optimizer
from petl.methods.dkvb.pooling import MeanCapture
from petl.system.collectives import gathered

logger = logging.getLogger(__name__)
BINS = 16  # columns of the map of uses; assumption


@register(
    "dkvb",
    summary="a classification head of frozen keys and trained values, for streams of new classes",
    need="classes that arrive one after the other",
    recommended="an update changes few values, so that earlier classes are not overwritten",
    paper="Träuble et al. 2023, Discrete Key-Value Bottleneck, ICML, arXiv:2207.11240",
    lr=SGD_LR,
    lr_by=("optimizer", {"sparse_adam": ADAM_LR}),
)
class DkvbModel(MethodTuner):
    """Tuner of `DkvbConfig`."""

    config_cls, adapter_cls = DkvbConfig, DkvbAdapter
    lacks = {
        Capability.MERGE: (
            "dkvb reads a table of values in place of the head and is no update of a weight; it "
            "cannot be merged: keep the adapter, or call unload() for the model with its own head"
        ),
    }
    capture_cls = MeanCapture
    calibration = staticmethod(lambda config: "method 'dkvb'")

    # Injection

    def choose_targets(self, config: Any, model: nn.Module) -> None:
        """Set the target to the head, and take it out of what PEFT trains."""
        head, given = head_of(model), config.target_modules
        names = {given} if isinstance(given, str) else given
        require(
            given is None or set(names) == {head},
            f"target_modules={given}: dkvb stands on the classification head, here {head!r}; leave "
            "it null",
        )
        config.target_modules = {head}
        others = without_head_names(config.modules_to_save)
        require(not others, f"modules_to_save={others}: dkvb trains no module; leave it null")
        config.modules_to_save = [NO_MODULE]

    def sources(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> Mapping[str, str]:
        """Return the encoder as the source of the head's input, with `pool=mean`."""
        if config.pool != "mean":
            return {}
        encoder = encoder_of(model)
        return dict.fromkeys(shapes, encoder)

    @staticmethod
    def on_wrap(
        model: nn.Module, config: Any, calibration: Calibration | None
    ) -> Callable[[PeftModel], None]:
        """Return the key phase over `calibration`, for the wrapped model.

        Raises:
            InputError: there is no calibration, unless the model has shapes only.
        """
        has_weights = not any(p.is_meta for p in model.parameters())
        if has_weights and calibration is None:
            raise no_calibration("method 'dkvb'")

        def finish(wrapped: PeftModel) -> None:
            (name,) = wrapped.peft_config
            tuner = cast(DkvbModel, wrapped.base_model)
            cast(Any, wrapped.peft_config[name]).modules_to_save = None
            if has_weights and calibration is not None:
                tuner.learn_keys(calibration, name)

        return finish

    # Key phase

    @torch.no_grad()
    def learn_keys(self, calibration: Calibration, adapter_name: str = "default") -> None:
        """Learn the keys of an adapter before it is trained, and log how many are used.

        `petl.wrap` calls it; an adapter that was added by `add_adapter` needs it, too. All
        processes must call it, each with its own part of the batches.

        Args:
            calibration: dicts of model inputs, whose labels are not read, of which the first
                `key_batches` are used; or a function that runs the model.
            adapter_name: the adapter.

        Raises:
            InputError: there are no batches, the head does not run, or its input is not finite.
        """
        config: Any = self.peft_config[adapter_name]
        (adapter,) = cast(Iterable[DkvbAdapter], self.placed[adapter_name].values())
        batches = self._collected(calibration, adapter, adapter_name, config.key_batches)
        every = torch.cat(
            [part for parts in gathered(batches) for part in parts] or [torch.empty(0)]
        )
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
        self._log_use(every.to(device), adapter.keys)

    def _log_use(self, pieces: Tensor, keys: Tensor) -> None:
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
        self, calibration: Calibration, adapter: DkvbAdapter, name: str, limit: int
    ) -> list[Tensor]:
        """Return the pieces of each of the first `limit` batches, on the CPU, [n, C, d]."""
        active = self.active_adapters
        self.set_adapter(name)
        batches: list[Tensor] = []
        try:
            with evaluation_mode(self.model):
                if callable(calibration):
                    adapter.collected = []
                    calibration()
                    batches = [pieces.cpu() for pieces in adapter.collected[:limit]]
                else:
                    for batch in islice(iter(calibration), limit):
                        adapter.collected = []
                        self._run(batch)
                        found = torch.cat(adapter.collected or [adapter.pieces(_nothing(adapter))])
                        batches.append(_without_padding(found, batch).cpu())
        finally:
            adapter.collected = None
            self.set_adapter(active)
        return batches

    def _run(self, batch: Mapping[str, Any]) -> None:
        device = next(self.model.parameters()).device
        inputs = send_to_device(dict(batch), device)
        inputs.pop("labels", None)
        self.model(**inputs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename keys and check tensors; PEFT has read `modules_to_save` by now."""
        config.modules_to_save = without_head_names(config.modules_to_save) or None
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # Training

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Return the optimizer of the config, without momentum and weight decay."""
        return make_optimizer(self._active_config().optimizer, groups)

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        start_step: int = 0,
        *,
        first: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Check that the optimizer moves picked values only.

        Raises:
            InputError: it would move others.
        """
        own = [p for adapter in self._active() for p in adapter.parameters()]
        check_optimizer(optimizer, own, self._active_config().optimizer)
        for adapter in self._active():
            if not adapter.has_keys:
                logger.warning(
                    "adapter %r of dkvb has random keys, which fit no data: call "
                    "model.base_model.learn_keys(batches, %r) before training",
                    adapter.info.adapter_name,
                    adapter.info.adapter_name,
                )

    def _active(self) -> Iterator[DkvbAdapter]:
        for name in self.active_adapters:
            yield from cast(Iterable[DkvbAdapter], self.placed.get(name, {}).values())

    def _active_config(self) -> Any:
        return self.peft_config[self.active_adapters[0]]

    # Metrics

    def series(self) -> dict[str, float]:
        """Return the fraction of keys that training has picked so far, and their perplexity."""
        uses = self._uses()
        if uses is None:
            return {}
        used, perplexity = use_of(uses)
        return {"keys_used": used, "key_perplexity": perplexity}

    def _uses(self) -> Tensor | None:
        """Return the uses on this process of the active adapter, [C, K]; None before training."""
        found = [adapter.uses for adapter in self._active()]
        return found[0] if found and bool(found[0].any()) else None

    def training_state(self) -> dict[str, Tensor]:
        """Return the uses of the keys, which the adapter file does not have."""
        return {f"{a.info.key}.{a.info.adapter_name}.uses": a.uses for a in self._active()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `training_state` returned."""
        for adapter in self._active():
            key = f"{adapter.info.key}.{adapter.info.adapter_name}.uses"
            adapter.uses.copy_(state[key])

    def heat_maps(self) -> list[HeatMap]:
        """Return how evenly training has used the keys of each codebook; none before training."""
        uses = self._uses()
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


def _nothing(adapter: DkvbAdapter) -> Tensor:
    """Return an input of the head without rows."""
    return adapter.keys.new_empty(0, adapter.shape.in_features)


def _without_padding(pieces: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return the pieces of tokens that are no padding; those of rows as they are."""
    mask = as_2d(batch.get("attention_mask"))
    if mask is None or mask.numel() != len(pieces):
        return pieces
    return pieces[mask.flatten().to(pieces.device).bool()]
