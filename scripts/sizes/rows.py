"""Rows of the tables: what is one adapter for each seed, with means, spreads and differences."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petl.experiments.reports.formatting import mean_text
from sizes.records import Record, by_key

METRIC = "accuracy"  # of all tasks of the study
TASK = "verbs"  # the task of the tables of one task


@dataclass(frozen=True)
class Row:
    """The records of one kind of adapter, of different seeds."""

    records: Sequence[Record]

    @property
    def group(self) -> str:
        """The group of the records."""
        return self.records[0].group

    @property
    def settings(self) -> Mapping[str, Any]:
        """What tells this row from the others of its group."""
        return self.records[0].settings

    @property
    def name(self) -> str:
        """The row in words."""
        given = self.settings
        if self.group == "compress":
            scope = ", of each tensor" if given["scope"] == "tensor" else ""
            return f"compress, density {given['density']:g}{scope}, alpha {given['alpha']}"
        if self.group == "prune":
            return f"prune {given['drop']:g}, q {given['q']}"
        if "level" not in given:
            return given["method"]
        density = f", density {given['density']:g}" if given["density"] < 1 else ""
        weight = f", weights {given['weight']:g}" if given["weight"] != 1 else ""
        return f"{given['method']}{density}{weight}, {given['level']}"

    def by_seed(self, task: str | None = TASK) -> dict[int, float]:
        """The score of each seed; without a task, the mean over tasks."""
        return {
            r.seed: statistics.fmean(r.scores.values()) if task is None else r.scores[task]
            for r in self.records
        }

    def mean(self, task: str | None = TASK) -> float:
        """The mean score over the seeds."""
        return statistics.fmean(self.by_seed(task).values())

    def text(self, task: str | None = TASK) -> str:
        """The mean score with its spread over the seeds."""
        return mean_text(METRIC, list(self.by_seed(task).values()))

    def bytes(self, *, packed: bool = False) -> float:
        """The mean size of the file, or of the file in gzip."""
        return statistics.fmean(r.packed if packed else r.bytes for r in self.records)

    def fact(self, name: str) -> list[float]:
        """The values of a fact, of the seeds that have it."""
        return [r.facts[name] for r in self.records if name in r.facts]

    def gains(self, other: "Row", task: str | None = TASK) -> list[float]:
        """The difference from another row for each seed that both have."""
        own, theirs = self.by_seed(task), other.by_seed(task)
        return [own[seed] - theirs[seed] for seed in own if seed in theirs]

    def is_above(self, other: "Row", task: str | None = TASK) -> bool:
        """True if the row scores higher with every seed."""
        gains = self.gains(other, task)
        return bool(gains) and min(gains) > 0

    def is_below(self, other: "Row", task: str | None = TASK) -> bool:
        """True if the row scores lower with every seed."""
        return other.is_above(self, task)


def rows_of(records: Iterable[Record], group: str, **settings: Any) -> list[Row]:
    """Return the rows of a group that have these settings."""
    chosen = [
        r
        for r in records
        if r.group == group and all(r.settings.get(k) == v for k, v in settings.items())
    ]
    return [Row(of_one) for of_one in by_key(chosen).values()]


def points(values: Sequence[float]) -> str:
    """Format differences in points: the mean, and the smallest and largest."""
    if not values:
        return ""
    mean, low, high = (
        f"{100 * v:+.1f}" for v in (statistics.fmean(values), min(values), max(values))
    )
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def verdict(values: Sequence[float]) -> str:
    """Format how many differences are positive."""
    better = sum(value > 0 for value in values)
    if len(values) > 1 and all(value < 0 for value in values):
        return f"worse in all {len(values)}"
    return f"better in {'all ' if better == len(values) else f'{better} of '}{len(values)}"


def standard_error(row: Row, task: str = TASK) -> float:
    """Return the standard error of a proportion on the test rows of a task."""
    share = row.mean(task)
    return math.sqrt(share * (1 - share) / row.records[0].rows[task])


def front(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, by size, that score higher on average than every smaller one."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.bytes(), -row.mean())):
        if not best or row.mean() > best[-1].mean():
            best.append(row)
    return best
