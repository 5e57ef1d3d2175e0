"""Scores by the strength of an adapter, on the page of a run: of ICV, or of `petl strength`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from petl.core.types import Record
from petl.data.tasks.scores import is_percentage
from petl.errors import InputError
from petl.system.values import type_problem
from petl.training.features import RunFeature
from petl.training.features.section import Curve, Lines, Section
from petl.training.runs.records import SCORES

LOST = "lost on retained texts"


class StrengthScores(TypedDict):
    """Scores by strength of the adapter, on examples that it was not trained on.

    `used` is the strength of the adapter as it is, `lost` what was lost on retained texts.
    """

    metric: str
    rows: int
    used: float
    scores: dict[str, float]
    lost: NotRequired[dict[str, float]]


class StrengthSection(RunFeature):
    """Shows the scores by strength, once there are some."""

    key = "strengths"

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return charts of scores and losses by strength, and of one against the other."""
        found = scores.get(cls.key)
        if found is None:
            return None
        problem = type_problem(found, StrengthScores)
        if problem:
            raise InputError(f"{folder / SCORES} cannot be used: {cls.key}: {problem}")
        metric, used, rows = found["metric"], found["used"], found["rows"]
        factor = 100 if is_percentage(metric) else 1
        name = f"{metric} (%)" if factor == 100 else metric
        points = _points(found["scores"], factor)
        if not points:
            return None
        title = f"{metric.replace('_', ' ').capitalize()} on {rows:,} held-out examples"
        mark = (f"used: {used:g}", used)
        charts = [Lines(title, "strength", name, [Curve(metric, points)], mark)]
        # of `petl strength` alone
        lost = _points(found.get("lost", {}))
        if lost:
            charts.append(Lines(LOST.capitalize(), "strength", "lost", [Curve("lost", lost)], mark))
            score = dict(points)
            pairs = sorted((value, score[place]) for place, value in lost if place in score)
            charts.append(Lines("What was learned and lost", LOST, name, [Curve(metric, pairs)]))
        return Section("Strength", charts=charts)


def _points(values: Mapping[str, float], factor: float = 1) -> list[tuple[float, float]]:
    """Return finite values by strength, in order."""
    found = ((float(place), factor * value) for place, value in values.items())
    return sorted(point for point in found if math.isfinite(point[1]))
