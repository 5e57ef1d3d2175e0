"""Comparison of finished runs: runs whose settings differ only in the seed form one entry.

Only scores on the same examples are compared: runs that were scored on others (another data set,
test file or number of examples) form a comparison of their own.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from petl.errors import InputError, did_you_mean
from petl.experiments.reports.entries import (
    SEED,
    TUNED,
    Entry,
    RunResult,
    data_of,
    group_by_settings,
    short_value,
)
from petl.experiments.reports.find_runs import find_runs
from petl.experiments.reports.formatting import seeds_text

MAX_VALUES = 4  # of a setting that are listed; above, only their number is given
BASELINE = "lora"  # the default
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Entries on one data set, compared by one metric.

    Attributes:
        entries: sorted by score, the best first; of equal scores, the one with the lower loss.
        baseline: the entry that the others are compared with, or None.
        examples: what tells the examples of the scores from those of other comparisons on the same
            data, in words; "" if there is no other.
        unscored: number of runs that are left out because they have no test scores.
    """

    entries: tuple[Entry, ...]
    baseline: Entry | None
    examples: str = ""
    unscored: int = 0

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
        return data_of(self.runs[0])

    @property
    def split(self) -> str:
        """The examples of the scores: "test", or "validation" for runs with train.test=false."""
        # all runs of a comparison agree, see `_on_topic`
        return "test" if self.runs[0].scores["after"] else "validation"

    @property
    def higher_is_better(self) -> bool:
        """True if the best score is the highest."""
        return self.runs[0].scores["higher_is_better"]

    @property
    def on_device(self) -> bool:
        """True if all runs computed on an accelerator, where processor time means little."""
        return all(run.environment["device"] != "cpu" for run in self.runs)

    def reference(self, name: str) -> dict[str, list[float]]:
        """By base model, the score called "before" or "linear_probe" of each seed that has it."""
        found: dict[str, dict[int, float]] = {}
        for run in self.runs:  # with one seed, the score does not depend on the method
            if self.metric in (run.scores.get(name) or {}):
                by_seed = found.setdefault(run.model, {})
                by_seed[run.seed] = run.scores[name][self.metric]
        return {model: list(by_seed.values()) for model, by_seed in found.items()}

    def confounders(self) -> list[str]:
        """Settings that differ between runs, besides method, loss, learning rate and seed."""
        expected = {SEED, *TUNED}
        # of different models, all further settings of `model` may differ
        several = len({run.model for run in self.runs}) > 1
        groups = ("method.", "loss.", *(("model.",) if several else ()))
        keys = dict.fromkeys(key for run in self.runs for key in run.settings)
        # method and loss are what is compared, so they may differ
        others = (key for key in keys if key not in expected and not key.startswith(groups))
        return [f"{key}={self._values(key)}" for key in sorted(others) if not self._is_equal(key)]

    def _is_equal(self, key: str) -> bool:
        """True if a setting is the same in all runs."""
        # `repr`: settings may be lists, which cannot be hashed
        return len({repr(run.settings.get(key)) for run in self.runs}) == 1

    def _values(self, key: str) -> str:
        values = dict.fromkeys(short_value(run.settings.get(key)) for run in self.runs)
        return " or ".join(values) if len(values) <= MAX_VALUES else f"{len(values)} values"

    def shared_seeds(self, entry: Entry) -> list[int]:
        """The seeds that an entry and the baseline both have, sorted."""
        known = self.baseline.seeds if self.baseline else []
        return [seed for seed in entry.seeds if seed in known]

    def gains(self, entry: Entry) -> list[float]:
        """Differences to the baseline for each of `shared_seeds`; positive is better."""
        sign = 1 if self.higher_is_better else -1
        by_seed = {run.seed: run.score for run in (self.baseline.runs if self.baseline else ())}
        return [sign * (r.score - by_seed[r.seed]) for r in entry.runs if r.seed in by_seed]

    def verdict(self, entry: Entry) -> str:
        """Return in which seeds an entry is better than the baseline, as text."""
        if self.baseline is None or entry is self.baseline:
            return ""
        gains, seeds = self.gains(entry), self.shared_seeds(entry)
        if not gains:
            return "no seed in common"
        if not any(gains):
            word, count = "equal", ""
        # one seed that is equal (gain 0) already counts as a mixed result
        elif min(gains) > 0 or max(gains) < 0:
            word, count = ("better" if gains[0] > 0 else "worse"), ""
        else:
            word, count = "better", f"{sum(gain > 0 for gain in gains)} of "
        every = "" if count or len(gains) == 1 else "all "
        return f"{word} in {count or every}{seeds_text(seeds)}"


def compare(paths: Iterable[Path], baseline: str = BASELINE) -> list[Comparison]:
    """Compare the finished runs in and below these folders, separately for each set of examples.

    Runs without test scores are left out where others of the data set have them; where none has
    them, as in a search, all are compared by their best validation score.

    Args:
        paths: folders of runs, or folders that contain folders of runs.
        baseline: name of the entry that the others are compared with, if there is one.

    Runs that cannot be read are left out with a warning.

    Raises:
        InputError: there is no finished run, or no entry with the name of `baseline`, if that is
            not the default.
    """
    found = find_runs(paths)
    for problem in found.left_out:
        logger.warning("left out: %s", problem)
    return compare_runs(found.runs, baseline)


def compare_runs(runs: Iterable[RunResult], baseline: str = BASELINE) -> list[Comparison]:
    """Compare runs that were read, as `compare`."""
    by_topic: dict[tuple[str, ...], list[RunResult]] = {}
    for run in runs:
        by_topic.setdefault(run.topic, []).append(run)
    found = [each for topic in sorted(by_topic) for each in _on_topic(by_topic[topic], baseline)]
    if baseline != BASELINE and not any(each.baseline for each in found):
        names = [entry.name for each in found for entry in each.entries]
        raise InputError(f"--baseline={baseline} is no entry{did_you_mean(baseline, names)}")
    return found


def _on_topic(runs: Sequence[RunResult], baseline: str) -> list[Comparison]:
    """Compare runs of one topic, separately for each set of examples that were scored."""
    # validation scores are compared only if no run has test scores
    scored = [run for run in runs if run.scores["after"]] or runs
    by_examples: dict[str, list[RunResult]] = {}
    for run in scored:
        # JSON as key: examples contain lists, which cannot be hashed
        by_examples.setdefault(json.dumps(run.examples, sort_keys=True), []).append(run)
    each = [group[0].examples for group in by_examples.values()]
    keys = dict.fromkeys(key for examples in each for key in examples)
    # a heading names only what tells the groups apart
    differing = [k for k in keys if len({repr(examples.get(k)) for examples in each}) > 1]
    found = []
    for examples, group in zip(each, by_examples.values(), strict=True):
        words = ", ".join(f"{key}={short_value(examples.get(key))}" for key in differing)
        entries = group_by_settings(group)
        # stable: entries with equal scores keep the order of their folders
        entries.sort(key=lambda entry: entry.quality, reverse=True)
        named = next((entry for entry in entries if entry.name == baseline), None)
        found.append(Comparison(tuple(entries), named, words, len(runs) - len(scored)))
    return found
