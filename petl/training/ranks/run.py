"""Ranks by the importance of blocks in a run: measured on its base model before it is wrapped.

petl train +method=lora +ranks=cfsp ranks.num_samples=64     of the run's own training rows
petl train +method=lora +ranks=cfsp +data@ranks.data=hamlet  of other data
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from petl.core.adapter_folder import read_config
from petl.core.registry import build_config
from petl.data.models.loading import load_base
from petl.system.progress import Shown
from petl.training.calibration import calibration_batches
from petl.training.dataloader import Splits
from petl.training.ranks.allocation import allocate, with_ranks
from petl.training.ranks.importance import block_importance
from petl.training.ranks.settings import RanksConfig
from petl.training.ranks.targets import rank_targets
from petl.training.runs.resume import ADAPTER
from petl.training.runs.run_folder import Run

MEASURING = "measuring the importance of blocks"
logger = logging.getLogger(__name__)


def ranks_by_importance(
    run: Run,
    base: PreTrainedModel,
    fields: Mapping[str, Any],
    splits: Splits,
) -> dict[str, Any]:
    """Return the patterns of ranks (and alphas) of a run; a resumed run has its checkpoint's.

    The importances are kept for the folder of the run, as `run.ranks`.

    Args:
        base: the base model, on the device of the run.
        fields: of the method, and the calibration data of its initialization, if any.
    """
    settings = run.config.ranks
    assert settings is not None
    if run.resume is not None:
        return patterns(read_config(run.resume / ADAPTER))
    own = {key: value for key, value in fields.items() if key != "calibration"}
    build = partial(load_base, run.config.model, splits.task, meta=True)
    targets = rank_targets(settings, build, own)
    run.timer.start()
    rows = calibration_batches(settings.calibration, run.config.model, splits, group="ranks")
    importance = block_importance(base, Shown(rows, MEASURING), settings.metric)
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
    run.ranks = record(settings, targets.mean, importance, ranks)
    return patterns(with_ranks(build_config(**own), base, ranks))


def patterns(config: Any) -> dict[str, Any]:
    """Return the fields of a config that have ranks and alphas by module."""
    names = ("rank_pattern", "alpha_pattern")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def record(
    settings: RanksConfig, mean: int, importance: Mapping[str, float], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Return the content of ranks.json; a block without targets has no rank."""
    return {
        "metric": settings.metric,
        "mean": mean,
        "least": settings.least,
        "most": settings.most,
        "power": settings.power,
        "budget": settings.budget,
        "calibration": settings.calibration,
        "blocks": [
            {"path": path, "importance": value, "rank": ranks.get(path)}
            for path, value in importance.items()
        ],
    }
