"""Train the contenders of a claim, and compare them example by example."""

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from claims.claim import Claim, Shown, Statement
from claims.intervals import Estimate, estimate
from claims.measures import Measure, scores, validation_losses
from claims.results import Map, Result, Scored
from petl.adapters.deltas.adapters import new_folder
from petl.errors import InputError, RunStopped
from petl.experiments.reports.run_report import read_heat_maps
from petl.experiments.sweeps.study import AT_THE_END, Contender, Study, slug
from petl.training.runs.records import is_finished, read_environment, read_results

# the test rows are scored once, after training; validation rows are held out in all runs alike, so
# that the runs that choose a learning rate and those that are compared have the same training rows
PLAIN = (
    f"train.eval_steps={AT_THE_END}",
    "train.linear_probe=false",
    "train.score_before=false",
)
logger = logging.getLogger("petl.claims")  # below petl, whose messages the command prints


@dataclass(frozen=True)
class Placed(Contender):
    """A contender whose words may have {data}.

    Attributes:
        data: the folder of the files of the claim's data.
    """

    data: Path

    @property
    def overrides(self) -> list[str]:
        return settings_in(self.data, super().overrides)


def study_of(
    claim: Claim, contenders: Sequence[Contender], folder: Path, jobs: int = 1, together: int = 1
) -> Study:
    """Return the study that trains contenders of a claim."""
    setting, data = claim.setting, data_folder(claim, folder)
    return Study(
        folder=folder / setting.name,
        contenders=[Placed(each.words, data) for each in contenders],
        seeds=list(setting.seeds),
        rates=list(setting.rates),
        overrides=[*PLAIN, *settings_in(data, setting.overrides)],
        jobs=jobs,
        together=together,
        outward=True,
        tuning_seeds=setting.tuning_seeds,
    )


def data_folder(claim: Claim, folder: Path) -> Path:
    """Return the folder of the files of a claim's data."""
    return folder / claim.setting.name / "data"


def settings_in(data: Path, overrides: Sequence[str]) -> list[str]:
    """Return settings of `petl train` with the folder of the data in place of {data}."""
    return [word.replace("{data}", str(data)) for word in overrides]


def prepare(claim: Claim, folder: Path) -> None:
    """Write the files of a claim's data, unless they are there."""
    data = data_folder(claim, folder)
    if claim.setting.write_files and not data.exists():
        with new_folder(data) as draft:
            claim.setting.write_files(draft)


def try_claim(claim: Claim, folder: Path, command: str, jobs: int = 1, together: int = 1) -> Result:
    """Train what is not finished, and write the claim's file after each contender.

    Args:
        folder: of the runs and the files; a stopped trial resumes in it.
        command: how the trial was started, for the file.

    Raises:
        InputError: several runs at a time, for statements about time or memory.
        RunStopped: runs failed; the other contenders are trained all the same.
    """
    refuse_at_a_time(claim, jobs, together)
    failed = []
    prepare(claim, folder)
    for number, group in enumerate(claim.groups, start=1):
        names = ", ".join(each.name for each in group)
        logger.info("%s [%d/%d]: %s", claim.name, number, len(claim.groups), names)
        try:
            study_of(claim, group, folder, jobs, together).run()
        except RunStopped as error:
            failed.append(f"{names}: {error}")
        measure(claim, folder, command).write(folder)
    if failed:
        raise RunStopped(f"{claim.name}: {'; '.join(failed)}", status=1)
    return measure(claim, folder, command)


def spot_check(claim: Claim, known: Result | None, folder: Path) -> dict[str, float]:
    """Train one seed of the contenders of a claim's first statement, at the published rates.

    Without a result, the rate is the middle one of those that a trial begins with.

    Args:
        known: the published result; None: there is none.
        folder: of the runs; a stopped check resumes in it.

    Returns:
        The value of the claim's first measure, by contender.
    """
    statement, seed, found = claim.statements[0], claim.setting.seeds[0], {}
    main = claim.measures[0]
    prepare(claim, folder)
    for words, _ in statement.signs:
        rates = claim.setting.rates
        rate = known.contenders[words].rate if known else rates[len(rates) // 2]
        rates = rates if rate is None else (rate,)
        one = replace(claim, setting=replace(claim.setting, seeds=(seed,), rates=rates))
        study_of(one, [Contender(words)], folder).run()
        run = finished(one, Contender(words), folder)[seed]
        found[words] = float(values_of(main, run).mean())
    return found


def refuse_finished(claim: Claim) -> None:
    """Raise InputError for a claim whose scripts are no longer in the tree."""
    if claim.finished:
        raise InputError(
            f"the study of {claim.name} is finished, its results are in docs/claims.md: to repeat "
            f"it, run git checkout {claim.finished}, then the same command"
        )


def refuse_at_a_time(claim: Claim, jobs: int = 1, together: int = 1) -> None:
    """Raise InputError for several runs at a time in a claim about their time or memory."""
    if claim.alone and (jobs > 1 or together > 1):
        raise InputError(
            f"{claim.name} compares time or memory of runs, which have to train one at a time: use "
            f"--jobs 1 --together 1 (now {jobs} and {together})"
        )


def measure(claim: Claim, folder: Path, command: str) -> Result:
    """Return what the finished runs of a claim show; trains nothing."""
    runs = {c.words: finished(claim, c, folder) for c in claim.contenders}
    found = {words: own for words, own in runs.items() if own}
    values = {
        each.name: {
            words: {seed: values_of(each, run) for seed, run in of_seeds.items()}
            for words, of_seeds in found.items()
        }
        for each in claim.measures
    }
    estimates = {
        statement.key: compared
        for statement in claim.statements
        if (compared := difference(statement, values[statement.measure.name])) is not None
    }
    means = {
        name: {w: {str(s): float(v.mean()) for s, v in by.items()} for w, by in of_words.items()}
        for name, of_words in values.items()
    }
    trained = [run for own in found.values() for run in own.values()]
    return Result(
        claim.name,
        [*PLAIN, *claim.setting.overrides],
        list(claim.setting.seeds),
        {
            words: scored(claim, Contender(words), of_seeds, folder, means)
            for words, of_seeds in found.items()
        },
        estimates,
        [each for shown in claim.shown if (each := averaged(shown, found.get(shown.words, {})))],
        circumstances(trained, command),
        {
            words: curve
            for words, of_seeds in found.items()
            if len(curve := curve_of(of_seeds.values())) > 1
        },
    )


def values_of(measure: Measure, run: Path) -> np.ndarray:
    """Return the values of a measure of a run."""
    assert measure.values is not None, "its claims are finished"
    return measure.values(run)


def curve_of(runs: Iterable[Path]) -> dict[str, list[float]]:
    """Return the validation losses of runs by the steps at which all of them have one."""
    losses = [validation_losses(run) for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in losses)))
    return {str(step): [each[step] for each in losses] for step in steps}


def finished(claim: Claim, contender: Contender, folder: Path) -> dict[int, Path]:
    """Return the folders of a contender's finished runs by seed."""
    place = folder / claim.setting.name / "runs" / slug(contender.name)
    found = {seed: place / f"seed-{seed}" for seed in claim.setting.seeds}
    return {seed: run for seed, run in found.items() if is_finished(run)}


def difference(statement: Statement, values: dict[str, dict[int, np.ndarray]]) -> Estimate | None:
    """Return the estimate of a statement over the seeds that all its contenders have.

    None with fewer than two such seeds.

    Args:
        values: of the statement's measure, by contender and seed.
    """
    signs, compared = statement.signs, statement.measure.compared
    seeds = set.intersection(*(set(values.get(words, {})) for words, _ in signs))
    if len(seeds) < 2:
        return None
    return estimate(
        {s: np.sum([sign * compared(values[w][s]) for w, sign in signs], axis=0) for s in seeds}
    )


def scored(
    claim: Claim,
    contender: Contender,
    runs: dict[int, Path],
    folder: Path,
    means: dict[str, dict[str, dict[str, float]]],
) -> Scored:
    """Return scores, learning rate and sizes of a contender with finished runs.

    Args:
        means: the mean value of each run, by measure, contender and seed.
    """
    results = [scores(run) for run in runs.values()]
    first = read_results(next(iter(runs.values())))
    tried = study_of(claim, [contender], folder).tried.get(contender.name)
    main, *others = claim.measures
    return Scored(
        means[main.name][contender.words],
        first["lr"],
        tried["validation"] if tried else {},  # a single rate is not tuned
        max(result["adapter_parameters"] for result in results),
        max(result["adapter_bytes"] for result in results),
        statistics.fmean(result["cpu_seconds"] for result in results),
        {each.name: means[each.name][contender.words] for each in others},
    )


def averaged(shown: Shown, runs: dict[int, Path]) -> Map | None:
    """Return a heat map with the mean of each cell over the runs; None without a run that has it.

    A cell is empty if it is in every run.
    """
    maps = [m for run in runs.values() for m in read_heat_maps(run) if m.name == shown.heat_map]
    if not maps:
        return None
    first = maps[0]
    cells = [
        [_mean([m.cells[i][j] for m in maps]) for j in range(len(first.columns))]
        for i in range(len(first.rows))
    ]
    return Map(shown.title, first.unit, first.meaning, first.rows, first.columns, cells)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def circumstances(runs: Iterable[Path], command: str) -> dict[str, Any]:
    """Return command, machines, packages, commits and times of runs; empty without any."""
    found = [read_environment(run) for run in runs]
    if not found:
        return {}
    machines = Counter(
        f"{e['processor']}, {e['cores']} cores, {e['threads']} thread(s), {e['device']}"
        for e in found
    )
    first = found[0]["packages"]
    return {
        "command": command,
        "machines": sorted(machines),
        "commits": sorted({str(e["git"]) for e in found}),
        "packages": {name: first[name] for name in ("petl", "torch", "transformers", "peft")},
        "started": [min(e["started"] for e in found), max(e["started"] for e in found)],
        "runs": len(found),
    }
