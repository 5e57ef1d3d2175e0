"""Finished runs and their scores; those whose settings differ only in the seed form one entry."""

import json
import logging
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from petl.core.types import Record
from petl.data.tasks.base import quality
from petl.data.tasks.scores import COUNTS
from petl.experiments.reports.formatting import as_yaml

SEED = "train.seed"
# left out of an entry's name where other settings differ: the learning rate has a column of its
# own, and the interval of the log changes no result
TUNED = {"train.lr", "train.log_steps"}
# settings of `data` that do not change which examples are scored
SAME_EXAMPLES = {
    *("train_rows", "streaming", "shuffle_buffer", "held_rows"),  # of the training examples
    *("text", "text_pair", "max_length", "max_seconds", "prefix", "pack", "stride"),  # of inputs
    *("max_answer_length", "max_target_length", "generate"),  # of answers
}
HELD_OUT = ("data.train_rows", "data.held_rows", "train.validation_share")  # for validation
PATTERN = re.compile(r"method\.(\w+_pattern)\.")  # of settings by module
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """One finished run."""

    path: Path
    settings: Record  # by dotted name, from `petl.training.runs.resume.identity`
    scores: Record  # scores.json
    environment: Record  # environment.json
    recipe: str | None = None  # given as `+method=`, if it was not a method

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.settings[SEED]

    @property
    def validation(self) -> Mapping[str, float]:
        """The best evaluation on validation examples; empty without any."""
        return validation_of(self.scores)

    @property
    def evaluation(self) -> Mapping[str, float]:
        """The scores on the test set; without them, those on the validation examples."""
        return self.scores["after"] or self.validation

    @property
    def score(self) -> float:
        """The task's metric in `evaluation`."""
        return self.evaluation[self.scores["metric"]]

    @property
    def topic(self) -> tuple[str, str, str]:
        """Data set, task and metric."""
        return data_of(self), self.scores.get("task", ""), self.scores["metric"]

    @property
    def examples(self) -> Record:
        """What tells the examples of `evaluation` from others of the topic: settings and counts."""
        found = {
            key: value
            for key, value in self.settings.items()
            if key.startswith("data.") and key.removeprefix("data.") not in SAME_EXAMPLES
        }
        if not self.scores["after"]:
            found |= {key: self.settings.get(key) for key in HELD_OUT}
        return found | {name: self.evaluation[name] for name in COUNTS if name in self.evaluation}

    @property
    def model(self) -> str:
        """The name of the base model, or its folder."""
        name = self.settings["model.name"]
        return str(self.settings.get("model.path") or name) if name == "path" else str(name)

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
    def seeds(self) -> list[int]:
        """The seeds of the runs, sorted."""
        return [run.seed for run in self.runs]

    @property
    def mean(self) -> float:
        """Mean score over seeds."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def quality(self) -> tuple[float, float]:
        """Sort key, higher is better: the mean score, then the mean loss."""
        return mean_quality(quality_of(run.scores, run.evaluation) for run in self.runs)

    @property
    def lrs(self) -> list[float]:
        """Peak learning rates of the runs, sorted; with train.find_lr each run finds its own."""
        return sorted({run.scores.get("lr", run.settings["train.lr"]) for run in self.runs})

    @property
    def parameters(self) -> int:
        """Parameters of the adapter, without a head; the maximum over seeds."""
        return max(run.scores["adapter_parameters"] for run in self.runs)

    @property
    def file_bytes(self) -> int:
        """Size of adapter_model.safetensors, including a trained head; the maximum over seeds."""
        return max(run.scores["adapter_bytes"] for run in self.runs)

    @property
    def step_seconds(self) -> float | None:
        """Seconds per optimizer step; the median over seeds; None without steps."""
        return self._per_step("seconds")

    @property
    def step_cpu_seconds(self) -> float | None:
        """Processor seconds per optimizer step; the median over seeds; None without steps."""
        return self._per_step("cpu_seconds")

    def lost(self, measure: str) -> list[float]:
        """Return what each run lost on retained texts; empty unless all have it.

        Args:
            measure: `lost`, in nats per token, or `drift` of models that do not write.
        """
        found = [(run.scores.get("retained") or {}).get(measure) for run in self.runs]
        return [value for value in found if value is not None] if None not in found else []

    def _per_step(self, name: str) -> float | None:
        # train.steps=0: what a method computes before training is the adapter
        found = [r.scores[name] / r.scores["steps"] for r in self.runs if r.scores["steps"]]
        return statistics.median(found) if found else None

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the device, on a CPU of the process (RSS); the maximum over seeds."""
        return max(r.scores.get("peak_device_bytes", r.scores["peak_rss_bytes"]) for r in self.runs)


def data_of(run: RunResult) -> str:
    """Return the data set of a run; for local files, also their names."""
    name, files = run.settings["data.name"], run.settings.get("data.train")
    return f"{name} {files}" if files else str(name)


def validation_of(scores: Record) -> Mapping[str, float]:
    """Return the best validation evaluation in a run's scores.json; empty without any."""
    if scores["validation"] is None:
        return {}
    return scores["validation_scores"]


def quality_of(scores: Record, evaluation: Mapping[str, float]) -> tuple[float, float]:
    """Return the `quality` of an evaluation of the run with this scores.json."""
    return quality(evaluation, scores["metric"], higher_is_better=scores["higher_is_better"])


def mean_quality(qualities: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the means over runs of metric and negated loss, from `quality` of each."""
    metric, loss = map(statistics.fmean, zip(*qualities, strict=True))
    return metric, loss


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


def started(run: RunResult) -> float:
    """Return when a run started, in seconds since 1970; 0 if that cannot be read."""
    try:  # texts of machines in several time zones would not be in order
        return datetime.fromisoformat(run.environment["started"]).timestamp()
    except ValueError:
        return 0.0


def latest_of_each_seed(runs: Sequence[RunResult]) -> list[RunResult]:
    """Sort runs of the same settings by seed; of several with one seed keep the latest."""
    by_seed: dict[int, RunResult] = {}
    for run in sorted(runs, key=started):
        if run.seed in by_seed:
            earlier = by_seed[run.seed].path
            logger.info("%s is left out: %s has the same settings, later", earlier, run.path)
        by_seed[run.seed] = run
    return [by_seed[seed] for seed in sorted(by_seed)]


def unique_names(runs: Sequence[RunResult]) -> list[str]:
    """Return a name for each run: recipe or method, loss, and the settings that tell them apart."""
    short = [short_name(run) for run in runs]
    names, longer, exact = [], [], []
    for name, settings in zip(short, (run.settings for run in runs), strict=True):
        same = [runs[i].settings for i, other in enumerate(short) if other == name]
        keys = sorted({key for other in same for key in {*settings, *other} if key != SEED})
        differing = [key for key in keys if len({repr(other.get(key)) for other in same}) > 1]
        named = [key for key in differing if key not in TUNED]
        names.append(" ".join([name, *_words(settings, named, same)]))
        longer.append(" ".join([name, *_words(settings, differing, same)]))
        exact.append(" ".join([name, *_words(settings, differing, same, as_yaml)]))
    # entries in which only tuned settings differ are told apart by them, then by more digits
    for others in (longer, exact):
        counts = Counter(names)
        names = [n if counts[n] == 1 else other for n, other in zip(names, others, strict=True)]
    return names


def _words(
    settings: Record,
    named: Iterable[str],
    same: Sequence[Record],
    write: Callable[[object], str] | None = None,
) -> list[str]:
    """Return the words for the settings `named`, which tell a run from those of `same`.

    Of `+ranks=cfsp`, settings that all runs with it share are left out. Of patterns for the same
    modules only the numbers are given, in the order of the modules' names.

    Args:
        write: formats a value; None: `short_value`.
    """
    words: dict[str, str] = {}
    write = write or short_value
    for key in (key for key in named if key in settings):
        pattern = PATTERN.match(key)
        if pattern is not None:
            of_each = {tuple(k for k in sorted(s) if k.startswith(pattern[0])) for s in same}
            modules = of_each - {()}
            if len(modules) == 1:
                numbers = [write(settings[k]) for k in modules.pop()]
                words[pattern[0]] = f"{pattern[1]}={','.join(numbers)}"
                continue
        elif key == "ranks.name":
            words[key] = f"ranks={settings[key]}"
            continue
        elif key.startswith("ranks.") and len({repr(s[key]) for s in same if key in s}) == 1:
            continue
        words[key] = f"{key.removeprefix('method.')}={write(settings[key])}"
    return list(words.values())


def short_value(value: object) -> str:
    """Format a setting, floats in 4 digits: a search draws learning rates with 16 of them."""
    return f"{value:.4g}" if isinstance(value, float) else as_yaml(value)


def short_name(run: RunResult) -> str:
    """Return the name of a run's method: `mola`, `mola+density`, `binary(mos)`, `houlsby`."""
    settings, inner = run.settings, run.settings.get("method.inner")
    method = run.recipe or settings["method.name"] + (f"({inner})" if inner else "")
    return f"{method}+{settings['loss.name']}" if "loss.name" in settings else method
