"""Finished runs side by side: those that differ in nothing but the seed are one entry."""

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
from petl.runs.resume import CONFIG, SCORES, identity, is_finished, read_scores, read_stored

SEED = "train.seed"
logger = logging.getLogger(__name__)
# no part of a name if anything else differs: what has a column of its own, and how a log is kept
TUNED = {"train.lr", "train.log_steps"}
FEW_VALUES = 4  # of a setting, that are named one by one


@dataclass(frozen=True)
class RunResult:
    """One finished run."""

    path: Path
    settings: Mapping[str, Any]  # by dotted name, as `petl.runs.resume.identity`
    scores: Mapping[str, Any]  # of scores.json
    environment: Mapping[str, Any]  # of environment.json
    recipe: str | None = None  # that was asked for, where that was no method

    @property
    def seed(self) -> int:
        return self.settings[SEED]

    @property
    def score(self) -> float:
        """By the task's metric: on the test rows, or on held-out train rows if those were left."""
        after = self.scores["after"]
        return after[self.scores["metric"]] if after else self.scores["validation"]

    @property
    def device(self) -> str:
        """What the run computed on."""
        found = self.environment
        return found["processor"] if found["device"] == "cpu" else found["device"]


@dataclass(frozen=True)
class Entry:
    """Runs of the same settings over several seeds."""

    name: str
    runs: tuple[RunResult, ...]  # in the order of their seeds

    @cached_property
    def scores(self) -> list[float]:
        """Score of each run."""
        return [run.score for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def lr(self) -> float:
        """The peak rate of the first run; with train.find_lr each finds its own."""
        first = self.runs[0]
        return first.scores.get("lr", first.settings["train.lr"])

    @property
    def parameters(self) -> int:
        """Of the adapter, the head left out; the most over seeds, where the method chooses."""
        return max(run.scores["adapter_parameters"] for run in self.runs)

    @property
    def file_bytes(self) -> int:
        """Of adapter_model.safetensors, a trained head included."""
        return max(run.scores["adapter_bytes"] for run in self.runs)

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step, the median over seeds."""
        return statistics.median(r.scores["seconds"] / r.scores["steps"] for r in self.runs)

    @property
    def step_cpu_seconds(self) -> float:
        """Processor seconds of an optimizer step, the median over seeds."""
        return statistics.median(r.scores["cpu_seconds"] / r.scores["steps"] for r in self.runs)

    @property
    def peak_bytes(self) -> int:
        """The most memory that a run held: of the device, or of the process on a CPU."""
        return max(r.scores.get("peak_device_bytes", r.scores["peak_rss_bytes"]) for r in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Entries that one score can be asked of.

    Attributes:
        entries: the best first.
        baseline: the entry that the others are measured against, or None.
    """

    entries: tuple[Entry, ...]
    baseline: Entry | None

    @property
    def runs(self) -> list[RunResult]:
        return [run for entry in self.entries for run in entry.runs]

    @property
    def metric(self) -> str:
        return self.runs[0].scores["metric"]

    @property
    def topic(self) -> str:
        """What the runs learned: the data set, and of files which ones."""
        return topic_of(self.runs[0])

    @property
    def rows(self) -> str:
        """What the scores are about: test rows, or held-out train rows of runs that left test."""
        return "test" if self.runs[0].scores["after"] else "held-out"

    @property
    def higher_is_better(self) -> bool:
        return self.runs[0].scores["higher_is_better"]

    @property
    def on_device(self) -> bool:
        """Whether all computed on an accelerator, whose clock is not the processor's."""
        return all(run.environment["device"] != "cpu" for run in self.runs)

    def reference(self, name: str) -> list[float]:
        """The scores called "before" or "linear_probe" of all runs that have them."""
        found = (run.scores.get(name) for run in self.runs)
        return [scores[self.metric] for scores in found if scores]

    def uneven(self) -> list[str]:
        """What else than method, loss, rate and seed differs between runs: settings and values."""
        apart = {SEED, *TUNED}
        own = ("method.", "loss.", *(() if self._one("model.name") else ("model.",)))
        keys = dict.fromkeys(key for run in self.runs for key in run.settings)
        told = [k for k in keys if k not in apart and not k.startswith(own) and not self._one(k)]
        return [f"{key}={self._values(key)}" for key in sorted(told)]

    def _one(self, key: str) -> bool:
        """Whether a setting is the same in all runs."""
        return len({repr(run.settings.get(key)) for run in self.runs}) == 1

    def _values(self, key: str) -> str:
        values = dict.fromkeys(in_short(run.settings.get(key)) for run in self.runs)
        return " or ".join(values) if len(values) <= FEW_VALUES else f"{len(values)} values"

    def gains(self, entry: Entry) -> list[float]:
        """By how much an entry is better than the baseline, for each seed that both have."""
        if self.baseline is None:
            return []
        sign = 1 if self.higher_is_better else -1
        known = {run.seed: run.score for run in self.baseline.runs}
        return [sign * (r.score - known[r.seed]) for r in entry.runs if r.seed in known]

    def verdict(self, entry: Entry) -> str:
        """How an entry compares with the baseline, seed by seed, in words."""
        gains = self.gains(entry)
        if entry is self.baseline or not gains:
            return ""
        if not any(gains):
            return f"equal in {'all ' if len(gains) > 1 else ''}{len(gains)}"
        if min(gains) > 0:
            return f"better in {'all ' if len(gains) > 1 else ''}{len(gains)}"
        if max(gains) < 0:
            return f"worse in {'all ' if len(gains) > 1 else ''}{len(gains)}"
        return f"better in {sum(gain > 0 for gain in gains)} of {len(gains)}"


def compare(paths: Iterable[Path], baseline: str = "lora") -> list[Comparison]:
    """The finished runs in these folders and below them side by side: those of each data set.

    Of a data set those that were scored on the test rows or, if none was, as in a search, all by
    their best score on held-out train rows.

    Args:
        paths: folders of runs, or folders that hold such.
        baseline: name of the entry that the others are measured against, if it is there.

    Raises:
        InputError: no finished run.
    """
    paths = list(paths)
    by_topic: dict[tuple[str, str], list[RunResult]] = {}
    for run in map(read_run, finished(paths)):
        by_topic.setdefault((topic_of(run), run.scores["metric"]), []).append(run)
    if not by_topic:
        raise InputError(f"no finished run in {', '.join(map(str, paths)) or 'no folder'}")
    return [compared(by_topic[topic], baseline) for topic in sorted(by_topic)]


def topic_of(run: RunResult) -> str:
    """The data set of a run, and of files which ones."""
    name, files = run.settings["data.name"], run.settings.get("data.train")
    return f"{name} {files}" if files else str(name)


def compared(runs: Sequence[RunResult], baseline: str) -> Comparison:
    """Runs of one data set and one metric, side by side."""
    entries = grouped([run for run in runs if run.scores["after"]] or runs)
    sign = -1 if runs[0].scores["higher_is_better"] else 1
    entries.sort(key=lambda entry: sign * entry.mean)
    named = next((entry for entry in entries if entry.name == baseline), None)
    return Comparison(tuple(entries), named)


def finished(paths: Iterable[Path]) -> list[Path]:
    """The folders of finished runs at or below these paths, sorted."""
    found = {file.parent for path in paths for file in sorted(Path(path).rglob(SCORES))}
    return sorted(folder for folder in found if is_finished(folder))


def read_run(path: Path) -> RunResult:
    """What the folder of a finished run tells.

    Raises:
        InputError: it was written by a version of petl that noted less.
    """
    scores = read_scores(path)
    lacking = {"higher_is_better", "adapter_parameters", "cpu_seconds"} - set(scores)
    if lacking:
        raise InputError(f"{path}/{SCORES} lacks {', '.join(sorted(lacking))}; run it again")
    settings = read_stored(path / CONFIG)
    environment = json.loads((path / "environment.json").read_text())
    return RunResult(path, identity(settings), scores, environment, settings.get("recipe"))


def grouped(runs: Sequence[RunResult]) -> list[Entry]:
    """The runs by their settings but for the seed, each group under a name of its own."""
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings.items() if key != SEED}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    ordered = [one_of_each_seed(group) for group in groups.values()]
    names = names_of([group[0] for group in ordered])
    return [Entry(name, tuple(group)) for name, group in zip(names, ordered, strict=True)]


def one_of_each_seed(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs of the same settings by their seeds; of several with one seed the last."""
    by_seed: dict[int, RunResult] = {}
    for run in sorted(runs, key=lambda run: run.environment["started"]):
        if run.seed in by_seed:
            earlier = by_seed[run.seed].path
            logger.info("%s is left out: %s is of the same settings and later", earlier, run.path)
        by_seed[run.seed] = run
    return [by_seed[seed] for seed in sorted(by_seed)]


def names_of(runs: Sequence[RunResult]) -> list[str]:
    """A name for each: recipe or method, loss, and what tells those of one method apart."""
    short = [short_name(run) for run in runs]
    names = []
    for name, mine in zip(short, (run.settings for run in runs), strict=True):
        same = [runs[i].settings for i, other in enumerate(short) if other == name]
        keys = sorted({key for other in same for key in {*mine, *other} if key != SEED})
        telling = [key for key in keys if len({repr(other.get(key)) for other in same}) > 1]
        kept = [key for key in telling if key not in TUNED] or telling
        said = (f"{k.removeprefix('method.')}={in_short(mine[k])}" for k in kept if k in mine)
        names.append(" ".join([name, *said]))
    return names


def in_short(value: Any) -> str:
    """A setting in few digits: a search draws rates with sixteen of them."""
    return f"{value:.4g}" if isinstance(value, float) else as_yaml(value)


def short_name(run: RunResult) -> str:
    """`mola`, `mola+density`, `binary(mos)`, `houlsby`."""
    settings, inner = run.settings, run.settings.get("method.inner")
    method = run.recipe or settings["method.name"] + (f"({inner})" if inner else "")
    return f"{method}+{settings['loss.name']}" if "loss.name" in settings else method
