"""What statements compare: numbers of the folder of a run, or of an edited adapter.

A measure has a value for each test example [N], or one of the whole run [1]. Those that are
compared by their ratio, such as seconds, are compared by differences of logarithms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from claims.intervals import Estimate
from petl.errors import InputError
from petl.experiments.reports.formatting import duration, number, size
from petl.system.files.read import iterate_json_lines, read_json
from petl.training.runs.records import METRICS, PREDICTIONS, SCORES, read_log

METRIC = "accuracy"
TOLERANCE = 1e-9
POINTS = 100  # of one


@dataclass(frozen=True)
class Measure:
    """A number of a contender.

    Attributes:
        name: in the files of results.
        title: in tables and pictures.
        values: of a folder: [N], one for each test example in the order of the rows, or [1].
        show: formats a value.
        unit: of differences; "" of ratios.
        scale: of differences in this unit, such as 100 for points.
        lower: lower values are better.
        ratio: contenders are compared by their ratio; all values are above 0.
        alone: of a process with one run, such as its seconds; other runs at a time would change it.
    """

    name: str
    title: str
    values: Callable[[Path], np.ndarray]
    show: Callable[[float], str]
    unit: str = ""
    scale: float = 1
    lower: bool = False
    ratio: bool = False
    alone: bool = False

    def compared(self, values: np.ndarray) -> np.ndarray:
        """Return values as they are compared: logarithms, or such that higher is better."""
        if self.ratio:
            return np.log(values)
        return -values if self.lower else values

    def shown(self, difference: float) -> float:
        """Return a difference of compared values as it is shown: as a ratio, or in the unit."""
        if self.ratio:
            return math.exp(difference)
        return self.scale * (-difference if self.lower else difference)

    def text(self, estimate: Estimate) -> str:
        """Return a difference and its interval in words, without "points"."""
        mean = self.shown(estimate.mean)
        low, high = sorted(map(self.shown, estimate.interval()))
        if self.ratio:
            return f"{mean:.3g} times ({low:.3g} to {high:.3g})"
        digits = 2 if self.scale > 1 else 3
        words = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
        return words if self.unit == "points" else f"{words} {self.unit}".rstrip()


def scores(folder: Path) -> dict[str, Any]:
    """Return scores.json of a run, or of an edited adapter, which has fewer entries."""
    return read_json(folder / SCORES, dict[str, Any])


def correct(folder: Path) -> np.ndarray:
    """Return for each test example [N], in the order of the rows, 1 if the prediction is right.

    Raises:
        InputError: the predictions do not give the accuracy of scores.json.
    """
    lines = sorted(iterate_json_lines(folder / PREDICTIONS), key=lambda line: line["row"])
    right = np.array([line["prediction"] == line["label"] for line in lines], dtype=float)
    score = scores(folder)["after"][METRIC]
    if not len(right) or abs(right.mean() - score) > TOLERANCE:
        raise InputError(
            f"{folder / PREDICTIONS} has not the accuracy of scores.json ({score}): remove the "
            "folder of the run, and start the same command again"
        )
    return right


def entry(*path: str) -> Callable[[Path], np.ndarray]:
    """Return a function that reads a number of scores.json, as [1]."""

    def read(folder: Path) -> np.ndarray:
        found: Any = scores(folder)
        for name in path:
            found = found[name]
        return np.array([float(found)])

    return read


def of_queries(folder: Path) -> np.ndarray:
    """Return nDCG@10 of each query [N] of a run of data.task=retrieval, in the order of rows."""
    lines = sorted(iterate_json_lines(folder / PREDICTIONS), key=lambda line: line["row"])
    return np.array([float(line["ndcg_at_10"]) for line in lines])


def losses(file: str) -> Callable[[Path], np.ndarray]:
    """Return a function that reads the loss of each row [N] from predictions in a folder."""

    def read(folder: Path) -> np.ndarray:
        lines = sorted(iterate_json_lines(folder / file), key=lambda line: line["row"])
        return np.array([float(line["loss"]) for line in lines])

    return read


def loss_on(name: str, title: str) -> "Measure":
    """Return the measure of the loss on the rows of a file of `Setting.also_on`."""
    values = losses(f"{also_folder(name)}/{PREDICTIONS}")
    return Measure(f"loss_{name}", title, values, nats, "nats", lower=True)


def validation_losses(folder: Path) -> dict[int, float]:
    """Return the loss on the validation rows by step of a run; empty without one."""
    log = read_log(folder / METRICS) if (folder / METRICS).exists() else []
    found = {each["step"]: each["validation"].get("loss") for each in log if "validation" in each}
    return {step: loss for step, loss in found.items() if loss is not None}


def loss_at(step: int, title: str) -> "Measure":
    """Return the measure of the loss on the validation rows after a step, one value of a run."""

    def read(folder: Path) -> np.ndarray:
        return np.array([validation_losses(folder)[step]])

    return Measure(f"validation_loss_{step}", title, read, nats, "nats", lower=True)


def also_folder(name: str) -> str:
    """Return the folder in a run of the scores on a file, as `petl eval` names it."""
    return f"eval-{name}"


def share(value: float) -> str:
    """Format a share of one."""
    return f"{POINTS * value:.1f} %"


def nats(value: float) -> str:
    """Format a loss."""
    return number(value, 4)


ACCURACY = Measure("accuracy", "test accuracy", correct, share, "points", POINTS)
SECONDS = Measure(
    "cpu_seconds", "processor time", entry("cpu_seconds"), duration, ratio=True, alone=True
)
MEMORY = Measure(
    "peak_rss_bytes",
    "peak memory",
    entry("peak_rss_bytes"),
    lambda value: size(round(value)),
    ratio=True,
    alone=True,
)
DENSITY = Measure("density", "active neurons", entry("after", "density"), share, ratio=True)
RUN_LOSS = Measure("run_loss", "test loss", entry("after", "loss"), nats, "nats", lower=True)
NDCG = Measure("ndcg_at_10", "test nDCG@10", of_queries, share, "points", POINTS)
LOSS = Measure("loss", "test loss", losses(PREDICTIONS), nats, "nats", lower=True)
