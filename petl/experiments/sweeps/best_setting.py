"""The best setting of a finished sweep, by the scores of its runs on validation examples."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig

from petl.core.types import Record
from petl.errors import InputError
from petl.experiments.reports.entries import SEED, mean_quality, quality_of, validation_of
from petl.experiments.reports.formatting import mean_text, sample_size, seeds_text
from petl.system.settings.command_line import is_optuna
from petl.training.compose import compose
from petl.training.runs.records import read_results
from petl.training.runs.resume import finished_run, identity, identity_of
from petl.training.runs.run_config import read_config

RESULTS = "optimization_results.yaml"  # written by the Optuna sweeper


def lines_of(config: DictConfig, jobs: Sequence[list[str]]) -> Iterator[str]:
    """Yield lines about the best setting of a sweep.

    Args:
        jobs: the overrides of each run.
    """
    candidates = others = jobs
    # the sweeper writes it at the end of the search
    if is_optuna() and (Path(config.hydra.sweep.dir) / RESULTS).is_file():
        candidates, others = best_trials(config, jobs)
    yield from best_setting_lines(candidates, others, config.train.output)


def best_trials(
    config: DictConfig, jobs: Sequence[list[str]]
) -> tuple[Sequence[list[str]], Sequence[list[str]]]:
    """Return the overrides of the trials with the best score, and those that all trials share.

    Trials of other workers, which are in the study's storage, are among them.

    Args:
        jobs: the overrides of the trials of this process.
    """
    import optuna

    sweeper = config.hydra.sweeper
    if sweeper.storage is None:  # a study in memory: this process has run all trials
        return jobs, jobs
    study = optuna.load_study(sweeper.study_name, sweeper.storage)
    best = study.best_trial
    # settings that the search has not chosen
    shared = [word for word in jobs[-1] if word.partition("=")[0] not in best.params]
    # several may have the best score
    tied = [trial.params for trial in study.trials if trial.value == best.value]
    return [[*shared, *(f"{k}={v}" for k, v in params.items())] for params in tied], [shared]


def best_setting_lines(
    candidates: Sequence[list[str]], others: Sequence[list[str]], output: str
) -> Iterator[str]:
    """Yield lines about the best setting of finished runs; none without a run.

    Settings are compared by their mean score over seeds on validation examples: the best run, or
    the best on the test examples, is the luckiest of several. Scores on the test examples are
    reported only.

    Args:
        candidates: overrides of the runs.
        others: overrides to compare with: those that all of these have are not printed.
        output: the folder of the runs.
    """
    runs = [(job, run) for job in candidates if (run := run_with(job, output)) is not None]
    if not runs:
        return
    settings: dict[str, SettingRuns] = {}
    for words, run in runs:
        values = identity_of(run) or {}
        seed = values.pop(SEED)  # what is left identifies the setting
        assert isinstance(seed, int), "the settings of a run were checked"
        # JSON as key: settings contain lists and dicts, which cannot be hashed
        setting = settings.setdefault(json.dumps(values, sort_keys=True), SettingRuns(words, {}))
        setting.runs[seed] = run
    if all(setting.validated for setting in settings.values()):
        yield from lines_about(list(settings.values()), others)
    else:
        yield (
            "no best setting is named, since runs have no validation scores (train.eval_steps) and "
            "a choice by test scores would prefer the luckiest"
        )
    yield f"to compare all runs: petl compare {output}"


@dataclass(frozen=True)
class SettingRuns:
    """Finished runs that differ in the seed.

    Attributes:
        words: the overrides of one of them.
        runs: their folders by seed.
    """

    words: list[str]
    runs: dict[int, Path]

    @cached_property
    def scores(self) -> dict[int, Record]:
        """The scores.json of each run, by seed."""
        return {seed: read_results(run) for seed, run in sorted(self.runs.items())}

    @property
    def validated(self) -> bool:
        """True if all runs have scores on validation examples."""
        return all(validation_of(scores) for scores in self.scores.values())

    def quality(self, seeds: Sequence[int]) -> tuple[float, float]:
        """The sort key of the setting: means over these seeds, on validation examples."""
        chosen = (self.scores[seed] for seed in seeds)
        return mean_quality(quality_of(scores, validation_of(scores)) for scores in chosen)


def lines_about(settings: Sequence[SettingRuns], others: Sequence[list[str]]) -> Iterator[str]:
    """Yield lines about the best of these settings; of equal ones about the first."""
    # over the same seeds, or a setting whose run of a bad seed failed would be preferred
    every = [set(setting.runs) for setting in settings]
    shared = sorted(set.intersection(*every))
    best = max(settings, key=lambda setting: setting.quality(shared or sorted(setting.runs)))
    seeds = shared or sorted(best.runs)
    chosen = [best.scores[seed] for seed in seeds]
    metric, validations = chosen[0]["metric"], [validation_of(scores) for scores in chosen]
    words = " ".join(
        word
        for word in best.words
        if any(word not in other for other in others) and not word.startswith(f"{SEED}=")
    )
    value = mean_text(metric, [scores[metric] for scores in validations])
    counted = ", ".join(filter(None, [sample_size(validations[0]), spread_text(seeds)]))
    yield (
        f"best setting (of {len(settings)}): {f'{words}: ' if words else ''}"
        f"validation {metric} {value} ({counted})"
    )
    if not shared:
        yield "the settings have no seed in common, so that a difference may be that of the seeds"
    elif any(seeds_of != set(shared) for seeds_of in every):
        yield f"seeds that only some of the settings have are left out; used: {seeds_text(shared)}"
    after = [scores["after"] for scores in chosen if scores["after"]]
    if after:
        tested = mean_text(metric, [scores[metric] for scores in after])
        yield f"test {metric} of the same runs, which was not used to choose: {tested}"
    yield f"its folder: {' '.join(str(best.runs[seed]) for seed in seeds)}"


def spread_text(seeds: Sequence[int]) -> str:
    """What is known of the spread over seeds, as text."""
    if len(seeds) == 1:
        return f"1 seed ({seeds[0]}): no spread is known"
    return f"mean ± standard deviation over {seeds_text(seeds)}"


def run_with(overrides: list[str], output: str) -> Path | None:
    """Return the finished run with these overrides in this folder of runs, if there is one."""
    try:
        return finished_run(output, identity(read_config(compose(overrides)).resolved))
    except InputError:  # invalid settings, reported when the run was started
        return None
