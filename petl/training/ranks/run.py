"""Ranks by the importance of blocks in a run: measured on its base model before it is wrapped.

petl train +method=lora +ranks=cfsp ranks.num_samples=64     of the run's own training rows
petl train +method=lora +ranks=cfsp +data@ranks.data=hamlet  of other data
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from peft import PeftConfig

from petl.core.adapter_folder import Folder
from petl.core.registry import build_config, method
from petl.core.types import Fields, Record
from petl.errors import InputError
from petl.system.collectives import on_main
from petl.system.files.disk import as_json, write_atomic
from petl.system.progress import ProgressItems
from petl.training.calibration import CalibrationData, calibration_batches
from petl.training.features import Context, RunFeature, Setup
from petl.training.features.section import Section
from petl.training.ranks.allocation import allocate, check_method, check_unset, with_ranks
from petl.training.ranks.file import PICTURE, RANKS, draw_ranks, rank_charts, read_ranks
from petl.training.ranks.importance import block_importance
from petl.training.ranks.targets import RanksConfig, rank_targets
from petl.training.runs.config import RunConfig
from petl.training.runs.records import ADAPTER

MEASURING = "measuring the importance of blocks"
logger = logging.getLogger(__name__)


class RanksByImportance(RunFeature):
    """Distributes ranks over blocks; a resumed run has those of its checkpoint."""

    Settings = RanksConfig
    settings: RanksConfig
    measured: Record | None = None  # the content of ranks.json, in a new run

    def check(self, config: RunConfig) -> None:
        """Raise InputError for a method that has no rank by block, or has ranks by module."""
        check_method(method(config.method["name"]).variant(config.method))
        adapter = build_config(**config.method)
        check_unset(adapter)
        start = getattr(adapter, "init_lora_weights", None)
        if start == "eva":
            raise InputError(
                f"method.init_lora_weights={start} distributes ranks itself, and so does ranks="
                f"{self.settings.name}; leave one of them out"
            )

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Add the patterns of ranks, and of alphas."""
        settings, run = self.settings, setup.run
        if run is not None and run.resume is not None:
            return fields | patterns(Folder(run.resume / ADAPTER).config)
        targets = rank_targets(settings, setup.shapes, fields)
        if run is None:
            setup.notes.append(
                f"the ranks of blocks come from data (ranks={settings.name}), with the mean "
                f"{targets.mean}; sizes and memory are those of rank {targets.mean} everywhere"
            )
            return fields
        run.timer.start()
        rows = calibration_batches(settings, setup.config.model, setup.splits)
        importance = block_importance(setup.base, ProgressItems(rows, MEASURING), settings.metric)
        run.timer.mark("ranks")
        ranks = allocate(
            {path: importance[path] for path in targets.cost},
            targets.mean,
            least=settings.least,
            most=settings.most,
            power=settings.power,
            cost=targets.cost,
        )
        logger.info(
            "ranks by importance of %d blocks: %d to %d, mean %d (%s)",
            len(ranks),
            min(ranks.values()),
            max(ranks.values()),
            targets.mean,
            settings.metric,
        )
        self.measured = record(settings, targets.mean, importance, ranks)
        return fields | patterns(with_ranks(build_config(**fields), setup.base, ranks))

    def before_training(self, context: Context) -> None:
        """Write ranks.json."""
        if self.measured is not None:
            content, file = as_json(self.measured, in_order=True), context.run.path / RANKS
            on_main(context.accelerator, lambda: write_atomic(file, content))

    def after_training(self, context: Context, step: int) -> Mapping[str, object]:
        """Draw the ranks."""
        on_main(context.accelerator, lambda: draw_ranks(context.run.path))
        return {}

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return charts of the ranks and of the importance of the blocks."""
        if not (folder / RANKS).exists():
            return None
        ranks = read_ranks(folder)
        data = ranks["calibration"]
        source = "the training data" if data["data"] is None else "other data (ranks.data)"
        text = (
            "Before training, the importance of each block was measured by how much it turns its "
            f"input ({ranks['metric']}), on up to {data['num_samples']:,} samples of at most "
            f"{data['seq_len']:,} tokens of {source}. Blocks of more importance have more rank."
        )
        return Section("Ranks by importance", text, rank_charts(ranks), drawn=[PICTURE])


def patterns(config: PeftConfig) -> Fields:
    """Return the fields of a config that have ranks and alphas by module."""
    names = ("rank_pattern", "alpha_pattern")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def record(
    settings: RanksConfig, mean: int, importance: Mapping[str, float], ranks: Mapping[str, int]
) -> Record:
    """Return the content of ranks.json; a block without targets has no rank."""
    names = [field.name for field in fields(CalibrationData)]
    return {
        "metric": settings.metric,
        "mean": mean,
        "least": settings.least,
        "most": settings.most,
        "power": settings.power,
        "budget": settings.budget,
        "calibration": {name: getattr(settings, name) for name in names},
        "blocks": [
            {"path": path, "importance": value, "rank": ranks.get(path)}
            for path, value in importance.items()
        ],
    }
