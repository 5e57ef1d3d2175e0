"""Comparison of finished runs: runs whose settings differ only in the seed form one entry."""

import json
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from petl.catalog.fields import as_yaml
from petl.errors import InputError
from petl.files.safe_open import check_links
from petl.runs.resume import CONFIG, SCORES, identity, is_finished, read_scores, read_stored

SEED = "train.seed"
logger = logging.getLogger(__name__)
# left out of an entry's name where other settings differ: the learning rate has a column of its
# own, and the interval of the log changes no result
TUNED = {"train.lr", "train.log_steps"}
MAX_VALUES = 4  # of a setting that are listed; above, only their number is given


@dataclass(frozen=True)
class RunResult:
    """One finished run."""

    path: Path
    settings: Mapping[str, Any]  # by dotted name, from `petl.runs.resume.identity`
    scores: Mapping[str, Any]  # scores.json
    environment: Mapping[str, Any]  # environment.json
    recipe: str | None = None  # given as `+method=`, if it was not a method

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.settings[SEED]

    @property
    def score(self) -> float:
        """The task's metric on the test set, or on the validation examples without test scores."""
        after = self.scores["after"]
        return after[self.scores["metric"]] if after else self.scores["validation"]

    @property
    def device(self) -> str:
        """Name of the accelerator, or of the processor without one."""
        values = self.environment
        return values["processor"] if values["device"] == "cpu" else values["device"]


@dataclass(frozen=True)
class Entry:
    """Runs with the same settings and different seeds."""

    name: str
    runs: tuple[RunResult, ...]  # sorted by seed

    @cached_property
    def scores(self) -> list[float]:
        """The score of each run."""
        return [run.score for run in self.runs]

    @property
    def mean(self) -> float:
        """Mean score over seeds."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def lr(self) -> float:
        """Peak learning rate of the first run; with train.find_lr each run finds its own."""
        first = self.runs[0]
        return first.scores.get("lr", first.settings["train.lr"])

    @property
    def parameters(self) -> int:
        """Parameters of the adapter, without a head; the maximum over seeds."""
        return max(run.scores["adapter_parameters"] for run in self.runs)

    @property
    def file_bytes(self) -> int:
        """Size of adapter_model.safetensors, including a trained head; the maximum over seeds."""
        return max(run.scores["adapter_bytes"] for run in self.runs)

    @property
    def step_seconds(self) -> float:
        """Seconds per optimizer step; the median over seeds."""
        return statistics.median(r.scores["seconds"] / r.scores["steps"] for r in self.runs)

    @property
    def step_cpu_seconds(self) -> float:
        """Processor seconds per optimizer step; the median over seeds."""
        return statistics.median(r.scores["cpu_seconds"] / r.scores["steps"] for r in self.runs)

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the device, on a CPU of the process (RSS); the maximum over seeds."""
        return max(r.scores.get("peak_device_bytes", r.scores["peak_rss_bytes"]) for r in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Entries on one data set, compared by one metric.

    Attributes:
        entries: sorted by score, the best first.
        baseline: the entry that the others are compared with, or None.
    """

    entries: tuple[Entry, ...]
    baseline: Entry | None

    @property
    def runs(self) -> list[RunResult]:
        """The runs of all entries."""
        return [run for entry in self.entries for run in entry.runs]

    @property
    def metric(self) -> str:
        """The name of the score."""
        return self.runs[0].scores["metric"]

    @property
    def topic(self) -> str:
        """The data set; for local files, also their names."""
        return topic_of(self.runs[0])

    @property
    def split(self) -> str:
        """The examples of the scores: "test", or "validation" for runs with train.test=false."""
        return "test" if self.runs[0].scores["after"] else "validation"

    @property
    def higher_is_better(self) -> bool:
        """True if the best score is the highest."""
        return self.runs[0].scores["higher_is_better"]

    @property
    def on_device(self) -> bool:
        """True if all runs computed on an accelerator, where processor time means little."""
        return all(run.environment["device"] != "cpu" for run in self.runs)

    def reference(self, name: str) -> list[float]:
        """The scores called "before" or "linear_probe" of all runs that have them."""
        evaluations = (run.scores.get(name) for run in self.runs)
        return [scores[self.metric] for scores in evaluations if scores]

    def confounders(self) -> list[str]:
        """Settings that differ between runs, besides method, loss, learning rate and seed."""
        expected = {SEED, *TUNED}
        # of different models, all further settings of `model` may differ
        groups = ("method.", "loss.", *(() if self._is_equal("model.name") else ("model.",)))
        keys = dict.fromkeys(key for run in self.runs for key in run.settings)
        others = (key for key in keys if key not in expected and not key.startswith(groups))
        return [f"{key}={self._values(key)}" for key in sorted(others) if not self._is_equal(key)]

    def _is_equal(self, key: str) -> bool:
        """True if a setting is the same in all runs."""
        return len({repr(run.settings.get(key)) for run in self.runs}) == 1

    def _values(self, key: str) -> str:
        values = dict.fromkeys(short_value(run.settings.get(key)) for run in self.runs)
        return " or ".join(values) if len(values) <= MAX_VALUES else f"{len(values)} values"

    def gains(self, entry: Entry) -> list[float]:
        """Differences to the baseline for each seed that both have; positive is better."""
        if self.baseline is None:
            return []
        sign = 1 if self.higher_is_better else -1
        by_seed = {run.seed: run.score for run in self.baseline.runs}
        return [sign * (r.score - by_seed[r.seed]) for r in entry.runs if r.seed in by_seed]

    def verdict(self, entry: Entry) -> str:
        """Return in how many seeds an entry is better than the baseline, as text."""
        gains = self.gains(entry)
        if entry is self.baseline or not gains:
            return ""
        seeds = "1 seed" if len(gains) == 1 else f"all {len(gains)} seeds"
        if not any(gains):
            return f"equal in {seeds}"
        if min(gains) > 0:
            return f"better in {seeds}"
        if max(gains) < 0:
            return f"worse in {seeds}"
        return f"better in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds"


def compare(paths: Iterable[Path], baseline: str = "lora") -> list[Comparison]:
    """Compare the finished runs in and below these folders, separately for each data set.

    Runs without test scores are left out where others of the data set have them; where none has
    them, as in a search, all are compared by their best validation score.

    Args:
        paths: folders of runs, or folders that contain folders of runs.
        baseline: name of the entry that the others are compared with, if there is one.

    Raises:
        InputError: there is no finished run.
    """
    paths = list(paths)
    by_topic: dict[tuple[str, str], list[RunResult]] = {}
    for run in map(read_run, finished_runs(paths)):
        by_topic.setdefault((topic_of(run), run.scores["metric"]), []).append(run)
    if not by_topic:
        raise InputError(f"no finished run in {', '.join(map(str, paths)) or 'no folder'}")
    return [_comparison(by_topic[topic], baseline) for topic in sorted(by_topic)]


def topic_of(run: RunResult) -> str:
    """Return the data set of a run; for local files, also their names."""
    name, files = run.settings["data.name"], run.settings.get("data.train")
    return f"{name} {files}" if files else str(name)


def _comparison(runs: Sequence[RunResult], baseline: str) -> Comparison:
    """Compare runs of one data set and one metric."""
    entries = group_by_settings([run for run in runs if run.scores["after"]] or runs)
    sign = -1 if runs[0].scores["higher_is_better"] else 1
    # stable: entries with equal scores keep the order of their folders
    entries.sort(key=lambda entry: sign * entry.mean)
    named = next((entry for entry in entries if entry.name == baseline), None)
    return Comparison(tuple(entries), named)


def finished_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the folders of finished runs at or below these paths, sorted."""
    # a set: paths may contain each other
    folders = {file.parent for path in paths for file in sorted(Path(path).rglob(SCORES))}
    return sorted(folder for folder in folders if is_finished(folder))


def read_run(path: Path) -> RunResult:
    """Read the folder of a finished run.

    Raises:
        InputError: an older version of petl wrote it, without some of the needed values; or a link
            in it leads out of it.
    """
    check_links(path)  # a comparison shows what these files contain
    scores = read_scores(path)
    missing = {"higher_is_better", "adapter_parameters", "cpu_seconds"} - set(scores)
    if missing:
        raise InputError(
            f"{path / SCORES} has no {', '.join(sorted(missing))}: an older version of petl wrote "
            "it; train the run again"
        )
    settings = read_stored(path / CONFIG)
    environment = json.loads((path / "environment.json").read_text())
    return RunResult(path, identity(settings), scores, environment, settings.get("recipe"))


def group_by_settings(runs: Sequence[RunResult]) -> list[Entry]:
    """Group runs that have the same settings except the seed, and give each group a unique name."""
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings.items() if key != SEED}
        # JSON as key: settings contain lists and dicts, which cannot be hashed
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    ordered = [latest_of_each_seed(group) for group in groups.values()]
    names = unique_names([group[0] for group in ordered])
    return [Entry(name, tuple(group)) for name, group in zip(names, ordered, strict=True)]


def latest_of_each_seed(runs: Sequence[RunResult]) -> list[RunResult]:
    """Sort runs of the same settings by seed; of several with one seed keep the latest."""
    by_seed: dict[int, RunResult] = {}
    for run in sorted(runs, key=lambda run: run.environment["started"]):
        if run.seed in by_seed:
            earlier = by_seed[run.seed].path
            logger.info("%s is left out: %s has the same settings, later", earlier, run.path)
        by_seed[run.seed] = run
    return [by_seed[seed] for seed in sorted(by_seed)]


def unique_names(runs: Sequence[RunResult]) -> list[str]:
    """Return a name for each run: recipe or method, loss, and the settings that tell them apart."""
    short = [short_name(run) for run in runs]
    names = []
    for name, settings in zip(short, (run.settings for run in runs), strict=True):
        same = [runs[i].settings for i, other in enumerate(short) if other == name]
        keys = sorted({key for other in same for key in {*settings, *other} if key != SEED})
        differing = [key for key in keys if len({repr(other.get(key)) for other in same}) > 1]
        # where only tuned settings differ, they tell the entries apart
        named = [key for key in differing if key not in TUNED] or differing
        words = (
            f"{key.removeprefix('method.')}={short_value(settings[key])}"
            for key in named
            if key in settings
        )
        names.append(" ".join([name, *words]))
    return names


def short_value(value: Any) -> str:
    """Format a setting, floats in 4 digits: a search draws learning rates with 16 of them."""
    return f"{value:.4g}" if isinstance(value, float) else as_yaml(value)


def short_name(run: RunResult) -> str:
    """Return the name of a run's method: `mola`, `mola+density`, `binary(mos)`, `houlsby`."""
    settings, inner = run.settings, run.settings.get("method.inner")
    method = run.recipe or settings["method.name"] + (f"({inner})" if inner else "")
    return f"{method}+{settings['loss.name']}" if "loss.name" in settings else method
