"""Train the contenders of a claim, and compare their predictions example by example."""

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from claims.claim import Claim, Shown, Statement
from claims.intervals import Estimate, estimate
from claims.results import Map, Result, Scored
from petl.errors import InputError, RunStopped
from petl.files.read import iterate_json_lines
from petl.runs.records import (
    PREDICTIONS,
    is_finished,
    read_environment,
    read_heat_maps,
    read_results,
)
from petl.sweeps.study import AT_THE_END, Contender, Study, slug

METRIC = "accuracy"
# the test rows are scored once, after training; validation rows are held out in all runs alike, so
# that the runs that choose a learning rate and those that are compared have the same training rows
PLAIN = (
    f"train.eval_steps={AT_THE_END}",
    "train.linear_probe=false",
    "train.score_before=false",
)
TOLERANCE = 1e-9
logger = logging.getLogger("petl.claims")  # below petl, whose messages the command prints


def study_of(
    claim: Claim, contender: Contender, folder: Path, jobs: int = 1, together: int = 1
) -> Study:
    """Return the study that trains one contender of a claim."""
    setting = claim.setting
    return Study(
        folder=folder / setting.name,
        contenders=[contender],
        seeds=list(setting.seeds),
        rates=list(setting.rates),
        overrides=[*setting.overrides, *PLAIN],
        jobs=jobs,
        together=together,
    )


def try_claim(claim: Claim, folder: Path, command: str, jobs: int = 1, together: int = 1) -> Result:
    """Train what is not finished, and write the claim's file after each contender.

    Args:
        folder: of the runs and the files; a stopped trial resumes in it.
        command: how the trial was started, for the file.

    Raises:
        RunStopped: runs failed; the other contenders are trained all the same.
    """
    failed = []
    for number, contender in enumerate(claim.contenders, start=1):
        logger.info("%s [%d/%d]: %s", claim.name, number, len(claim.contenders), contender.name)
        try:
            study_of(claim, contender, folder, jobs, together).run()
        except RunStopped as error:
            failed.append(f"{contender.name}: {error}")
        measure(claim, folder, command).write(folder)
    if failed:
        raise RunStopped(f"{claim.name}: {'; '.join(failed)}", status=1)
    return measure(claim, folder, command)


def measure(claim: Claim, folder: Path, command: str) -> Result:
    """Return what the finished runs of a claim show; trains nothing."""
    runs = {c.words: finished(claim, c, folder) for c in claim.contenders}
    found = {words: of_seeds for words, of_seeds in runs.items() if of_seeds}
    right = {
        words: {seed: correct(run) for seed, run in of_seeds.items()}
        for words, of_seeds in found.items()
    }
    estimates = {
        str(i): compared
        for i, statement in enumerate(claim.statements)
        if (compared := difference(statement, right)) is not None
    }
    return Result(
        claim.name,
        [*claim.setting.overrides, *PLAIN],
        list(claim.setting.seeds),
        {words: scored(claim, words, of_seeds, folder) for words, of_seeds in found.items()},
        estimates,
        [each for shown in claim.shown if (each := averaged(shown, found.get(shown.words, {})))],
        circumstances([run for of_seeds in found.values() for run in of_seeds.values()], command),
    )


def finished(claim: Claim, contender: Contender, folder: Path) -> dict[int, Path]:
    """Return the finished runs of a contender by seed."""
    runs = folder / claim.setting.name / "runs" / slug(contender.name)
    found = {seed: runs / f"seed-{seed}" for seed in claim.setting.seeds}
    return {seed: run for seed, run in found.items() if is_finished(run)}


def correct(run: Path) -> np.ndarray:
    """Return for each test example [N], in the order of the rows, 1 if the prediction is right.

    Raises:
        InputError: the predictions do not give the accuracy of scores.json.
    """
    lines = sorted(iterate_json_lines(run / PREDICTIONS), key=lambda line: line["row"])
    right = np.array([line["prediction"] == line["label"] for line in lines], dtype=float)
    score = read_results(run)["after"][METRIC]
    if not len(right) or abs(right.mean() - score) > TOLERANCE:
        raise InputError(
            f"{run / PREDICTIONS} has not the accuracy of scores.json ({score}): remove the "
            "folder of the run, and start the same command again"
        )
    return right


def difference(statement: Statement, right: dict[str, dict[int, np.ndarray]]) -> Estimate | None:
    """Return the estimate of a statement over the seeds that all its contenders have.

    None with fewer than two such seeds.
    """
    signs = statement.signs
    seeds = set.intersection(*(set(right.get(words, {})) for words, _ in signs))
    if len(seeds) < 2:
        return None
    return estimate({s: np.sum([sign * right[w][s] for w, sign in signs], axis=0) for s in seeds})


def scored(claim: Claim, words: str, runs: dict[int, Path], folder: Path) -> Scored:
    """Return scores, learning rate and sizes of a contender with finished runs."""
    results = {seed: read_results(run) for seed, run in runs.items()}
    contender = Contender(words)
    first = next(iter(results.values()))
    tried = study_of(claim, contender, folder).tried.get(contender.name)
    return Scored(
        {str(seed): result["after"][METRIC] for seed, result in results.items()},
        first["lr"] if tried is None else tried["taken"],  # a single rate is not tuned
        {} if tried is None else tried["validation"],
        max(result["adapter_parameters"] for result in results.values()),
        max(result["adapter_bytes"] for result in results.values()),
        statistics.fmean(result["cpu_seconds"] for result in results.values()),
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
