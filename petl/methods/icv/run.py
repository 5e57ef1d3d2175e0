"""What a run does for ICV: demonstrations of its rows, and scores by strength on further ones."""

import logging
import math
from pathlib import Path
from typing import Any, TypedDict

from petl.core.registry import build_config, needs_calibration
from petl.core.types import Record
from petl.data.tasks.scores import is_percentage
from petl.errors import InputError
from petl.methods.icv.demonstrations import demonstrations, held_rows, settings_of
from petl.methods.icv.strengths import STRENGTHS, best_strength, scores_by_strength
from petl.system.values import type_problem
from petl.training.features import Context, Fields, RunFeature, Setup
from petl.training.features.section import Curve, Lines, Section
from petl.training.runs.records import SCORES

logger = logging.getLogger(__name__)


class StrengthScores(TypedDict):
    """Scores on training rows by strength of the adapter, and the strength that is used."""

    metric: str
    rows: int
    used: float
    scores: dict[str, float]


class Strengths(RunFeature):
    """Scores the adapter at several strengths, and sets that of `strength=auto`."""

    key = "strengths"

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Choose the demonstrations as calibration data."""
        config = build_config(**fields)
        if setup.accelerator is not None and needs_calibration(config):
            setup.calibration = demonstrations(config, setup.config, setup.splits)
        return fields

    def before_training(self, context: Context) -> None:
        """Score training rows that are no demonstrations; without such rows there are no scores."""
        run, splits = context.run, context.splits
        config: Any = context.model.active_peft_config
        data = settings_of(config)
        rows = held_rows(splits, data)
        if rows is None:
            logger.info(
                "no scores by strength: all training rows are demonstrations (%d)", data.num_samples
            )
            return
        task, is_auto = splits.task, config.strength == "auto"
        if self.key not in run.scores:

            def score() -> float:
                what = f"scoring {len(rows)} training examples with strength {config.strength:g}"
                return context.evaluate(rows, what)[task.metric]

            tried = {*STRENGTHS} if is_auto else {*STRENGTHS, config.strength}
            found = scores_by_strength(context.model, score, sorted(tried))
            used = config.strength
            if is_auto:
                used = best_strength(found, higher_is_better=task.higher_is_better)
            by_strength = {f"{strength:g}": value for strength, value in found.items()}
            note = {"metric": task.metric, "rows": len(rows), "used": used, "scores": by_strength}
            context.add({self.key: note}, self.key)
        if is_auto:
            config.strength = run.scores[self.key]["used"]
            logger.info("strength %g: the best on %d training rows", config.strength, len(rows))

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return a chart of the scores by strength."""
        found = scores.get(cls.key)
        if found is None:
            return None
        problem = type_problem(found, StrengthScores)
        if problem:
            raise InputError(f"{folder / SCORES} cannot be used: {cls.key}: {problem}")
        metric, used, rows = found["metric"], found["used"], found["rows"]
        factor = 100 if is_percentage(metric) else 1
        by_strength = ((float(strength), value) for strength, value in found["scores"].items())
        points = [(place, factor * value) for place, value in by_strength if math.isfinite(value)]
        chart = Lines(
            f"{metric.replace('_', ' ').capitalize()} on {rows:,} held-out training examples",
            "strength",
            f"{metric} (%)" if factor == 100 else metric,
            [Curve(metric, sorted(points))],
            (f"used: {used:g}", used),
        )
        return Section("Strength", charts=[chart]) if points else None
