"""The files of a run's folder that describe it, read and checked: they may be damaged or foreign.

Readers raise an `InputError` of one line that names the file and the field. The values of
config.yaml are data: an interpolation such as `${oc.env:HOME}` stays text.
"""

import math
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from petl.data.tasks.scores import COUNTS, PROPORTIONS
from petl.errors import InputError
from petl.system.files.read import read_json, read_json_lines, read_yaml
from petl.system.settings.schema import flat
from petl.system.values import type_problem
from petl.training.runs.lookup import ADAPTER as ADAPTER
from petl.training.runs.lookup import CONFIG as CONFIG
from petl.training.runs.lookup import SCORES

if TYPE_CHECKING:  # petl.core imports torch
    from petl.core.types import Record, Settings

REPORT = "report.html"
ENVIRONMENT, METRICS = "environment.json", "metrics.jsonl"
EVALUATED = "eval-test"  # folder in which `petl eval RUN` writes
PREDICTIONS, BEFORE = "predictions.jsonl", "predictions_before.jsonl"  # of the test examples
Evaluation = dict[str, Real]  # scores by name; a loss may be infinite


# The configuration


class GroupHeader(TypedDict):
    """The settings of a group that every command needs."""

    name: str


class TrainSettings(TypedDict):
    """The settings under `train` that comparisons need."""

    seed: int
    lr: float


class Config(TypedDict):
    """The part of config.yaml that reports and comparisons use."""

    method: GroupHeader
    model: GroupHeader
    data: GroupHeader
    train: TrainSettings
    loss: NotRequired[GroupHeader | None]
    recipe: NotRequired[str | None]


def read_stored(file: Path) -> "Record":
    """Read the config.yaml of a run.

    Raises:
        InputError: it cannot be read, or lacks the settings of `Config`.
    """
    stored = read_yaml(file, Config)
    # runs from before the setting were in float32, also where auto is something else
    stored["train"].setdefault("precision", "no")
    return stored


def refuse_interpolations(settings: "Settings", file: Path) -> None:
    """Check that no setting of a run needs resolving; runs of petl store the resolved values.

    Raises:
        InputError: a value has an interpolation, or is `???`.
    """
    for key, value in flat(settings).items():
        if "${" in str(value) or value == "???":
            raise InputError(
                f"{file} cannot be used: {key} is an interpolation, which is not resolved, since "
                "the file may come from a stranger; write the value in its place"
            )


# The scores


class ScoresFile(TypedDict, total=False):
    """The content of scores.json, of which an unfinished run has the first three at most."""

    linear_probe: Evaluation | None
    before: Evaluation | None
    after: Evaluation | None  # null with train.test=false
    task: str
    metric: str
    higher_is_better: bool
    validation: Real | None
    validation_scores: Evaluation | None
    best_step: int | None
    steps: int
    lr: float
    head_lr: float | None
    tokens: int
    unit: str
    padding: float
    seconds: float
    cpu_seconds: float
    trainable_parameters: int
    adapter_parameters: int
    adapter_bytes: int
    method: dict[str, float]  # figures of the trained adapter, of methods that have some
    time_split: dict[str, float]
    peak_rss_bytes: int
    peak_device_bytes: int


# that every finished run has
FINAL = ScoresFile.__annotations__.keys() - {
    *("linear_probe", "before", "method", "peak_device_bytes"),
}
SIZES = ("bytes", "parameters", "seconds")  # ends of the names of values that are not negative


def read_scores(run: Path) -> "Record":
    """Read scores.json of a run's folder.

    Raises:
        InputError: it cannot be read, or a value has another type.
    """
    scores = read_json(run / SCORES, dict[str, Any])
    problem = type_problem(scores, ScoresFile)
    if problem:
        raise InputError(f"{run / SCORES} cannot be used: {problem}")
    return scores


def read_results(run: Path) -> "Record":
    """Read scores.json of a finished run, whose values are complete and belong together.

    Raises:
        InputError: as `read_scores`; a value is missing, or out of range.
    """
    scores = read_scores(run)
    problem = _problem_of(scores)
    if problem:
        raise InputError(f"{run / SCORES} cannot be used: {problem}")
    return scores


def _problem_of(scores: "Settings") -> str:
    """Return what is wrong with the scores of a finished run, or ""."""
    missing = sorted(FINAL - scores.keys())
    if missing:
        return f"it has no {missing[0]}; it is damaged"
    for name in ("after", "before", "linear_probe", "validation_scores"):
        problem = _problem_of_evaluation(scores.get(name) or {}, scores["metric"])
        if problem:
            return f"{name} has {problem}"
    if not scores["after"] and scores["validation"] is None:
        return "it has neither test scores nor a validation score"
    if scores["best_step"] is not None and scores["validation"] is None:
        return "it has a best_step, and no validation score"
    if scores["validation"] is not None and not scores["validation_scores"]:
        return "it has a validation score, and no validation_scores"
    if scores["steps"] < 0:
        return f"steps is {scores['steps']}, below 0"
    sizes = [name for name in ScoresFile.__annotations__ if name.endswith(SIZES)]
    negative = [name for name in sizes if scores.get(name, 0) < 0]
    return f"{negative[0]} is {scores[negative[0]]}, below 0" if negative else ""


def _problem_of_evaluation(evaluation: "Settings", metric: str) -> str:
    """Return what is wrong with an evaluation, or "": an absent one has no problem."""
    if evaluation and metric not in evaluation:
        return f"no {metric}, the metric"
    for name, value in evaluation.items():
        if name in COUNTS and not (value >= 0 and float(value).is_integer()):
            return f"{name} {value}, which is no count"
        # NaN: a score that is not defined for these examples
        if name in PROPORTIONS and math.isfinite(value) and not 0 <= value <= 1:
            return f"{name} {value}, which is not from 0 to 1"
    return ""


def is_finished(run: Path) -> bool:
    """Return True if the run has been scored after training.

    Raises:
        InputError: its scores.json is damaged.
    """
    # a folder that another process makes may have no scores yet
    return (run / SCORES).exists() and "after" in read_scores(run)


# The environment and the log


class Environment(TypedDict):
    """The content of environment.json."""

    command: str
    started: str
    processes: int
    device: str
    processor: str
    cores: int | None
    threads: int
    python: str
    platform: str
    packages: dict[str, str | None]
    git: str | None
    init_from: NotRequired[str | None]


def read_environment(run: Path) -> "Record":
    """Read environment.json of a run's folder.

    Raises:
        InputError: it cannot be read, or does not have the entries of `Environment`.
    """
    return read_json(run / ENVIRONMENT, Environment)


class LogLine(TypedDict):
    """The entries of a line of metrics.jsonl that are no metrics."""

    step: int
    validation: NotRequired[Evaluation]


def read_log(file: Path) -> "list[Record]":
    """Read metrics.jsonl, without a last line that a killed process left incomplete.

    Raises:
        InputError: it cannot be read, or a line has another form.
    """
    lines = read_json_lines(file, LogLine)
    for number, line in enumerate(lines, start=1):
        # checked as part of LogLine; the number in its place passes
        problem = type_problem({**line, "validation": 0}, dict[str, Real])
        if problem:
            raise InputError(f"{file}, line {number}, cannot be used: {problem}")
    return lines


def of_task(line: "Settings", label: str) -> str:
    """The name of a class: of several tasks, whose labels may have equal names, with the task's."""
    return f"{line['task']}/{label}" if isinstance(line.get("task"), str) else label
