"""Train the contenders of a claim, edit them, and compare them example by example."""

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from claims.claim import AND, EDIT, Claim, Shown, Statement, made_of
from claims.edits import MADE_OF, edit, origin
from claims.intervals import Estimate, estimate
from claims.measures import also_folder, scores, validation_losses
from claims.results import Map, Result, Scored
from claims.score import Scorer
from claims.several import Tasks, assemble
from petl.adapters.deltas.adapters import new_folder
from petl.adapters.export.saved_adapter import find
from petl.errors import InputError, RunStopped
from petl.experiments.reports.run_report import read_heat_maps
from petl.experiments.sweeps.study import AT_THE_END, Contender, Study, slug
from petl.generation.prediction.evaluation import evaluate_saved
from petl.training.runs.records import (
    SCORES,
    is_finished,
    read_environment,
    read_results,
)

# the test rows are scored once, after training; validation rows are held out in all runs alike, so
# that the runs that choose a learning rate and those that are compared have the same training rows
PLAIN = (
    f"train.eval_steps={AT_THE_END}",
    "train.linear_probe=false",
    "train.score_before=false",
    "train.precision=no",  # as when claims were tried first; settings may have another one
)
logger = logging.getLogger("petl.claims")  # below petl, whose messages the command prints


@dataclass(frozen=True)
class Placed(Contender):
    """A contender whose words may have {data}, or stand for settings.

    Attributes:
        data: the folder of the files of the claim's data.
        stands_for: as of `Setting`.
    """

    data: Path
    stands_for: Mapping[str, Sequence[str]] = field(default_factory=dict, compare=False)

    @property
    def overrides(self) -> list[str]:
        words = (self.stands_for.get(word, (word,)) for word in super().overrides)
        return settings_in(self.data, [*chain.from_iterable(words)])


def study_of(
    claim: Claim, contenders: Sequence[Contender], folder: Path, jobs: int = 1, together: int = 1
) -> Study:
    """Return the study that trains contenders of a claim."""
    setting, data = claim.setting, data_folder(claim, folder)
    return Study(
        folder=folder / setting.name,
        contenders=[Placed(each.words, data, setting.stands_for) for each in contenders],
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


def score_also(claim: Claim, contender: Contender, folder: Path) -> None:
    """Score the trained runs of a contender on the further files of the setting."""
    place = folder_of(claim, contender, folder)
    for run in (place / f"seed-{seed}" for seed in claim.setting.seeds):
        if is_finished(run):
            for name in missing(claim, run):
                file = data_folder(claim, folder) / f"{name}.jsonl"
                evaluate_saved(find(run), [str(file)], [], run / also_folder(name))


def missing(claim: Claim, run: Path) -> list[str]:
    """Return the further files that a run has not been scored on."""
    # scores.json is written last
    names = claim.setting.also_on
    return [name for name in names if not (run / also_folder(name) / SCORES).exists()]


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
            if EDIT in group[0].words:
                edit_all(claim, group[0], folder)
            else:
                study_of(claim, group, folder, jobs, together).run()
        except RunStopped as error:
            failed.append(str(error))
        for contender in group:
            score_also(claim, contender, folder)
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
        for part in made_of(words):
            rates = claim.setting.rates
            rate = None if known else rates[len(rates) // 2]
            if known and part in known.contenders:
                rate = known.contenders[part].rate
            rates = rates if rate is None else (rate,)
            one = replace(claim, setting=replace(claim.setting, seeds=(seed,), rates=rates))
            study_of(one, [Contender(part)], folder).run()
            score_also(one, Contender(part), folder)
        if EDIT in words:
            edit_all(one, Contender(words), folder)
        run = finished(one, Contender(words), folder)[seed]
        found[words] = float(main.values(run).mean())
    return found


def refuse_at_a_time(claim: Claim, jobs: int = 1, together: int = 1) -> None:
    """Raise InputError for several runs at a time in a claim about their time or memory."""
    if claim.alone and (jobs > 1 or together > 1):
        raise InputError(
            f"{claim.name} compares time or memory of runs, which have to train one at a time: use "
            f"--jobs 1 --together 1 (now {jobs} and {together})"
        )


def edit_all(claim: Claim, contender: Contender, folder: Path) -> None:
    """Edit the adapters of the finished runs that a contender is made of, and score them."""
    change, of = contender.words.partition(EDIT)[2], made_of(contender.words)
    done = finished(claim, contender, folder)
    trained = [finished(claim, Contender(words), folder) for words in of]
    ready = sorted(set.intersection(*map(set, trained)) - set(done))
    if not ready:
        return
    place = folder_of(claim, contender, folder)
    if AND in contender.words:
        tasks = Tasks([each[ready[0]] for each in trained], of)  # one base of a task for all seeds
        for seed in ready:
            assemble(change, [each[seed] for each in trained], tasks, place / f"seed-{seed}")
        return
    (runs,) = trained
    scorer = Scorer(runs[ready[0]])  # one base model for all seeds
    for seed in ready:
        edit(change, runs[seed], seed, scorer, place / f"seed-{seed}")


def measure(claim: Claim, folder: Path, command: str) -> Result:
    """Return what the finished runs of a claim show; trains nothing.

    Measures that take a pass over rows, such as that of routers, are computed once for each run.
    """
    runs = {c.words: finished(claim, c, folder) for c in (*claim.trained, *claim.edited)}
    found = {c.words: runs[c.words] for c in claim.contenders if runs[c.words]}
    values = {
        each.name: {
            words: {seed: each.values(run) for seed, run in of_seeds.items()}
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
    trained = [run for c in claim.trained for run in runs[c.words].values()]
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


def curve_of(runs: Iterable[Path]) -> dict[str, list[float]]:
    """Return the validation losses of runs by the steps at which all of them have one."""
    losses = [validation_losses(run) for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in losses)))
    return {str(step): [each[step] for each in losses] for step in steps}


def finished(claim: Claim, contender: Contender, folder: Path) -> dict[int, Path]:
    """Return the folders of a contender's finished runs, or edited adapters, by seed.

    A run is finished when it is scored on the further files of the setting as well, an edited
    adapter when it is made of the runs that are there now.
    """
    place = folder_of(claim, contender, folder)
    found = {seed: place / f"seed-{seed}" for seed in claim.setting.seeds}
    done = {s: run for s, run in found.items() if is_finished(run) and not missing(claim, run)}
    if EDIT not in contender.words:
        return done
    runs = [finished(claim, Contender(words), folder) for words in made_of(contender.words)]
    return {
        seed: made
        for seed, made in done.items()
        if all(seed in of_part for of_part in runs)
        and scores(made).get(MADE_OF) == origin([of_part[seed] for of_part in runs])
    }


def folder_of(claim: Claim, contender: Contender, folder: Path) -> Path:
    """Return the folder of a contender's runs, or edited adapters."""
    kind = "edited" if EDIT in contender.words else "runs"
    return folder / claim.setting.name / kind / slug(contender.name)


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
    trained, *more = [Contender(words) for words in made_of(contender.words)]
    of_training = next(iter(finished(claim, trained, folder).values()))
    first = read_results(of_training)
    tried = study_of(claim, [trained], folder).tried.get(trained.name)
    main, *others = claim.measures
    return Scored(
        means[main.name][contender.words],
        None if more else first["lr"],  # each part has a rate of its own, in its row of the table
        tried["validation"] if tried and not more else {},  # a single rate is not tuned
        max(result.get("adapter_parameters", first["adapter_parameters"]) for result in results),
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
