"""A study: train several methods over several seeds, each with its best learning rate.

    tune/NAME/lr-RATE/   runs that score learning rates on validation examples, not on the test set
    tune/NAME/lr-RATE-seed-S/    those of further seeds, at the best rate and its neighbours
    runs/NAME/seed-S/    runs with the best learning rate of each method, scored on the test set
    replaced/NAME/       runs with a learning rate that was the best one of fewer rates
    *.log                next to each run: its output
    rates.json           the validation score of each learning rate, and the chosen one
    precision.json       what train.precision=auto is for the runs of each model

Each run is a process of `petl train`, forked from one that has imported what they need. Finished
runs are kept: the same command resumes a stopped study.
"""

import logging
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NotRequired, TypedDict

from petl.core.types import Record
from petl.data.models.sources import ModelSource
from petl.errors import InputError, RunStopped
from petl.experiments.reports.entries import mean_quality, quality_of, validation_of
from petl.experiments.reports.formatting import count_text, duration
from petl.experiments.sweeps.forked_runs import ForkedRuns
from petl.experiments.sweeps.found_precision import found_precision
from petl.experiments.sweeps.run_log import reason_in
from petl.system.files.disk import append_to, as_json, remove, write_atomic
from petl.system.files.read import read_json
from petl.system.settings.command_line import config_dir_words, how_to_continue, quoted
from petl.training.compose import compose
from petl.training.runs.config import RunConfig
from petl.training.runs.records import is_finished, read_results
from petl.training.runs.resume import (
    PRECISION,
    as_begun,
    differences,
    identity,
    identity_of,
    is_whole,
    summary,
)
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import AUTO

TOGETHER = (sys.executable, "-m", "petl.cli.train_together")
RATES = "rates.json"
PRECISIONS = "precision.json"
REPLACED = "replaced"
AT_THE_END = 10**9  # as train.eval_steps: evaluate after the last step only
TUNING_SEEDS = 3  # of the choice of a learning rate
FIRST = 3  # learning rates that a search outward begins with
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """A method with settings of its own: `words` is for example "binary method.inner=lora".

    {seed} in them stands for the seed of the run: "sparse method.init_seed={seed}".
    """

    words: str

    @property
    def name(self) -> str:
        """The name in folders and tables: "binary inner=lora"."""
        return self.words.replace("method.", "")

    @property
    def overrides(self) -> list[str]:
        """The words as overrides of `petl train`."""
        method, *others = self.words.split()
        return [f"+method={method}", *others]


class Rates(TypedDict):
    """The learning rates of a method in rates.json.

    Attributes:
        validation: the mean score of each rate over its seeds.
        seeds: how many these are.
        failed: the rates of which no run finished.
        taken: the chosen one.
        edge: "highest" or "lowest", if it is that of all rates that were tried; "" in between.
    """

    validation: dict[str, float]
    seeds: NotRequired[dict[str, int]]
    failed: NotRequired[list[str]]
    taken: float
    edge: NotRequired[str]


Qualities = dict[int, tuple[float, float]]  # metric and negated loss, by seed


class Runs(TypedDict):
    """What a process that makes several runs gets on standard input.

    Attributes:
        together: runs at a time.
        runs: of each, `overrides` of `petl train` and the file of its `log`.
    """

    together: int
    runs: list[Record]


@dataclass(frozen=True)
class StudyJob:
    """One run of a study."""

    folder: Path
    overrides: list[str]

    @property
    def scores(self) -> Record:
        """scores.json of the finished run."""
        return read_results(self.folder)

    @property
    def log(self) -> Path:
        """The file with the output of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Study:
    """The methods, seeds and learning rates of a study.

    Attributes:
        contenders: the methods, at least one.
        rates: learning rates to choose from. One: used for all runs. Empty: each run uses the
            default of its method. A contender whose words have train.lr keeps that rate.
        outward: begin with the middle `FIRST` of the rates, which are in ascending order; then try
            the next one outward, while the best one is at an end of those that were tried.
        tuning_seeds: how many seeds choose a rate: one scores all rates, further ones the best rate
            and its two neighbours.
        overrides: settings of `petl train` for every run.
        jobs: number of runs at a time, or of processes if several runs are in one.
        together: number of runs of one method that train in one pass over one base; 1: each run is
            a process.
    """

    folder: Path
    contenders: list[Contender]
    seeds: list[int]
    rates: list[float]
    overrides: list[str] = field(default_factory=list)
    jobs: int = 1
    together: int = 1
    outward: bool = False
    tuning_seeds: int = TUNING_SEEDS

    def run(self) -> None:
        """Train every run that is not finished.

        Raises:
            InputError: invalid settings, or the folder contains another study.
            RunStopped: final runs failed, or all tuning runs of a method; the others are made all
                the same, and the message has the logs and the reasons.
        """
        self._check()
        try:
            self._run()
        finally:
            for idle in self._idle:
                idle.close()

    def _run(self) -> None:
        self._tune()
        chosen = {c: self.best_rate(c) for c in self.contenders if self._can_train(c)}
        for contender, rate in chosen.items():
            self._replace(contender, rate)
        failed = self._train_all(
            # seed by seed, so that a load of the machine that changes slowly meets all contenders
            [self._final(c, seed, rate) for seed in self.seeds for c, rate in chosen.items()]
        )
        for contender in chosen:
            runs = [j for j in failed if j.folder.parent.name == slug(contender.name)]
            if runs:
                self._note(f"{contender.name}: {count_text(len(runs), 'run')} failed", runs)
        if self.failures:
            raise RunStopped("\n".join([*self.failures, how_to_continue()]))

    @cached_property
    def failures(self) -> list[str]:
        """Sentences on the contenders of which runs failed: the logs, and the last error."""
        return []

    def _note(self, what: str, failed: Sequence[StudyJob]) -> None:
        logs = ", ".join(str(job.log) for job in failed)
        last = failed[-1].log
        self.failures.append(f"{what}, see {logs}: {reason_in(last, self._written.get(last, 0))}")

    @cached_property
    def _written(self) -> dict[Path, int]:
        """The bytes that a log had before this command, by file."""
        return {}

    # The runs

    def _tuning(self, contender: Contender, rate: float, seed: int = 0) -> StudyJob:
        # one evaluation on validation examples, and none on the test set
        steps = [f"train.eval_steps={AT_THE_END}", "train.test=false"]
        name = f"lr-{rate:g}" if seed == 0 else f"lr-{rate:g}-seed-{seed}"
        folder = self.folder / "tune" / slug(contender.name) / name
        return self._job(folder, contender, seed, [*steps, f"train.lr={rate:g}"])

    def _final(self, contender: Contender, seed: int, rate: float | None) -> StudyJob:
        folder = self.folder / "runs" / slug(contender.name) / f"seed-{seed}"
        first = contender is self.contenders[0]  # the linear probe is the same for all methods
        probe = [] if first else ["train.linear_probe=false"]
        lr = [] if rate is None else [f"train.lr={rate:g}"]
        return self._job(folder, contender, seed, [*probe, *lr])

    def _job(self, folder: Path, contender: Contender, seed: int, more: Sequence[str]) -> StudyJob:
        # Hydra parses the value: quotes protect commas, spaces and equals signs
        location = [f"train.run={quoted(str(folder))}", "train.resume=auto"]
        location.append("train.keep_checkpoints=1")
        own = [word.replace("{seed}", str(seed)) for word in contender.overrides]
        return StudyJob(folder, [*own, *self.overrides, f"train.seed={seed}", *more, *location])

    def best_rate(self, contender: Contender) -> float | None:
        """Return the learning rate to train with, and save it in rates.json.

        Compared are the rates with the most finished seeds, by the mean validation score: taken is
        the lowest one that is not told apart from the best (`told_apart`).

        None if there are no learning rates to choose from, as with a rate in the words.
        """
        rates = self._rates(contender)
        if len(rates) < 2:
            self._forget(contender)
            return next(iter(rates), None)
        qualities = self._qualities(contender)
        most = max(map(len, qualities.values()))
        compared = {rate: found for rate, found in qualities.items() if len(found) == most}
        best = max(compared, key=lambda rate: mean_quality(compared[rate].values()))
        taken = min(r for r in compared if not told_apart(compared[best], compared[r]))
        scores = {
            f"{rate:g}": statistics.fmean(job.scores["validation"] for job in found)
            for rate in qualities
            if (found := self._finished(contender, rate).values())
        }
        failed = [rate for rate in rates if self._tuning(contender, rate) in self._failed]
        tried = [*qualities, *failed]
        ends = {min(tried): "lowest", max(tried): "highest"}
        chosen = Rates(
            validation=scores,
            seeds={f"{rate:g}": len(found) for rate, found in qualities.items()},
            failed=[f"{rate:g}" for rate in failed],
            taken=taken,
            edge=ends.get(taken, ""),
        )
        # the file may have methods of which an earlier command chose the rates
        write_atomic(self.folder / RATES, as_json(self.tried | {contender.name: chosen}))
        return taken

    def _forget(self, contender: Contender) -> None:
        """Remove from rates.json what an earlier command chose for a contender."""
        noted = self.tried
        if noted.pop(contender.name, None) is not None:
            write_atomic(self.folder / RATES, as_json(noted))

    def _finished(self, contender: Contender, rate: float) -> dict[int, StudyJob]:
        """Return the finished runs that score a learning rate, by seed."""
        jobs = {seed: self._tuning(contender, rate, seed) for seed in range(self.tuning_seeds)}
        return {seed: job for seed, job in jobs.items() if is_finished(job.folder)}

    def _qualities(self, contender: Contender) -> dict[float, Qualities]:
        """Return the validation scores of the rates of which the run of the first seed finished."""
        rates = self._rates(contender)
        found = {rate: jobs for rate in rates if 0 in (jobs := self._finished(contender, rate))}
        return {
            rate: {s: quality_of(job.scores, validation_of(job.scores)) for s, job in jobs.items()}
            for rate, jobs in found.items()
        }

    def _first_best(self, contender: Contender) -> float:
        """Return the best rate of the first seed, which decides which others are tried."""
        qualities = self._qualities(contender)
        return max(qualities, key=lambda rate: (qualities[rate][0], -rate))

    def _can_train(self, contender: Contender) -> bool:
        """Return True unless no run finished that was to score a rate of a contender."""
        return len(self._rates(contender)) < 2 or bool(self._qualities(contender))

    def _leave_out(self, contender: Contender) -> None:
        """Note that no run finished at any rate that was tried."""
        rates = (self._tuning(contender, rate) for rate in self._rates(contender))
        failed = [job for job in rates if job in self._failed]
        count = count_text(len(failed), "learning rate")
        self._note(f"{contender.name} is left out: no run of {count} finished", failed)
        self._forget(contender)

    def _tune(self) -> None:
        """Score learning rates: all of them, or from the middle outward; then the best again."""
        tuned = [contender for contender in self.contenders if len(self._rates(contender)) > 1]
        tried = {contender: self._first_rates(contender) for contender in tuned}
        due = [(c, rate) for c, rates in tried.items() for rate in rates]
        while due:
            self._tune_with([self._tuning(contender, rate) for contender, rate in due])
            for contender in [c for c in tried if not self._can_train(c)]:
                self._leave_out(contender)
                del tried[contender]
            found = [(c, self._next_rate(self._first_best(c), rates)) for c, rates in tried.items()]
            due = [(contender, rate) for contender, rate in found if rate is not None]
            for contender, rate in due:
                tried[contender].append(rate)
        self._tune_with(
            [
                self._tuning(contender, rate, seed)
                for seed in range(1, self.tuning_seeds)
                for contender in tried
                for rate in self._nearest(contender)
            ]
        )
        for contender in tried:
            self.best_rate(contender)
            self._warn(contender)

    def _tune_with(self, jobs: list[StudyJob]) -> None:
        self._failed.extend(self._train_all(jobs))

    @cached_property
    def _failed(self) -> list[StudyJob]:
        """The runs that were to score a learning rate, and failed."""
        return []

    def _warn(self, contender: Contender) -> None:
        """Say what limits the choice of a learning rate."""
        entry = self.tried[contender.name]
        counts = entry.get("seeds", {})
        most = max(counts.values())
        for rate in self._nearest(contender):
            if counts[f"{rate:g}"] < most:
                logger.warning(
                    "%s: lr=%g is left out of the choice: %d of %d seeds finished, see above",
                    contender.name,
                    rate,
                    counts[f"{rate:g}"],
                    most,
                )
        if entry.get("edge"):
            logger.warning(
                "%s: lr=%g is the %s of the learning rates that were tried; one beyond it may be "
                "better: give more with --rates",
                contender.name,
                entry["taken"],
                entry["edge"],
            )

    def _nearest(self, contender: Contender) -> list[float]:
        """Return the best rate of the first seed and its neighbours of which a run finished."""
        known = sorted(self._qualities(contender))
        place = known.index(self._first_best(contender))
        return known[max(place - 1, 0) : place + 2]

    def _rates(self, contender: Contender) -> list[float]:
        """Return the rates to choose from for a contender."""
        fixed = any(word.startswith("train.lr=") for word in contender.overrides)
        return [] if fixed else self.rates

    def _first_rates(self, contender: Contender) -> list[float]:
        """Return the rates that are tried whatever their scores are, and those tried before."""
        skipped = max(0, len(self.rates) - FIRST) // 2 if self.outward else 0
        first = self.rates[skipped : len(self.rates) - skipped]
        known = [r for r in self.rates if is_finished(self._tuning(contender, r).folder)]
        return [rate for rate in self.rates if rate in {*first, *known}]

    def _next_rate(self, best: float, tried: Sequence[float]) -> float | None:
        """Return the rate beyond the best one if that is at an end of those tried; else None."""
        if best == max(tried):
            return next((rate for rate in self.rates if rate > max(tried)), None)
        if best == min(tried):
            return next((rate for rate in reversed(self.rates) if rate < min(tried)), None)
        return None

    def _replace(self, contender: Contender, rate: float | None) -> None:
        """Move runs with another learning rate than the chosen one to the folder `replaced`."""
        for folder in (self._final(contender, seed, rate).folder for seed in self.seeds):
            used = (identity_of(folder) or {}).get("train.lr")
            if rate is None or used is None or used == float(f"{rate:g}"):
                continue
            place = self.folder / REPLACED / folder.parent.name / f"{folder.name}-lr-{used:g}"
            logger.info("%s had lr=%g, now %g: it is trained again", folder, used, rate)
            remove(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(place)

    @property
    def tried(self) -> dict[str, Rates]:
        """By method, the validation score of each learning rate and the chosen one (rates.json)."""
        file = self.folder / RATES
        return read_json(file, dict[str, Rates]) if file.exists() else {}

    # Training

    def _check(self) -> None:
        """Raise InputError for invalid settings, and for a folder that contains another study."""
        names = [slug(contender.name) for contender in self.contenders]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"{name} is in the study {names.count(name)} times; give each method once"
                )
        for name, values in (("--seeds", self.seeds), ("--rates", self.rates)):
            if len(set(values)) < len(values):
                raise InputError(f"{name}={','.join(map(str, values))} has a value twice")
        for contender in self.contenders:
            for word, place in self._replaced(contender):
                raise InputError(f"{word}: the study sets it for each run; give it as {place}")
            jobs = [self._tuning(contender, rate) for rate in self._rates(contender)]
            jobs += [self._final(contender, seed, None) for seed in self.seeds]
            # one job is enough: the others differ from it in valid numbers only
            self._accept(contender, read_config(compose(jobs[-1].overrides)))
            for job in jobs:
                existing = identity_of(job.folder)
                if existing is not None:
                    refuse_other(job, existing)

    def _accept(self, contender: Contender, config: RunConfig) -> None:
        """Note the settings of a contender that each run would complete for itself."""
        if config.train.together > 1:
            raise InputError(
                f"train.together={config.train.together} is for sweeps; use --together "
                f"{config.train.together}"
            )
        # of a bfloat16 model, and with what needs float32, it is the same everywhere
        fixed = config.model.dtype == "bfloat16" or config.float32
        if config.train.precision == AUTO and not fixed:
            self._automatic[slug(contender.name)] = config.model

    def _replaced(self, contender: Contender) -> Iterator[tuple[str, str]]:
        """Yield the settings that the study would replace by its own, and where they are given."""
        chosen = {"train.seed": "--seeds", "train.run": "the folder of the study"}
        if self._rates(contender):
            chosen["train.lr"] = "--rates, or in --method for one method"
        for word in (*contender.overrides, *self.overrides):
            key = word.lstrip("+").partition("=")[0]
            if key in chosen:
                yield word, chosen[key]

    def _train_all(self, jobs: list[StudyJob]) -> list[StudyJob]:
        """Train the runs that are not finished, `self.jobs` at a time; return those that failed."""
        due = [job for job in jobs if not is_whole(job.folder)]
        if len(due) < len(jobs):
            runs = count_text(len(jobs), "run")
            logger.info("already finished: %d of %s", len(jobs) - len(due), runs)
        begun, done = time.monotonic(), 0
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                units = self._units([self._in_precision(job) for job in due])
                started = [pool.submit(self._train_unit, unit) for unit in units]
                for ended in as_completed(started):
                    for job, seconds in ended.result():
                        done += 1
                        self._report(job, seconds, done, len(due), time.monotonic() - begun)
            except BaseException:  # Ctrl-C included: do not start the runs in the queue
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._forking:
                    process.terminate()
                raise
        return [job for job in due if not is_whole(job.folder)]

    @cached_property
    def _automatic(self) -> dict[str, ModelSource]:
        """The models of the contenders with train.precision=auto, by the name of the folder."""
        return {}

    def _in_precision(self, job: StudyJob) -> StudyJob:
        """Return a run with the precision that auto is for it, as it began or as in this study."""
        model = self._automatic.get(job.folder.parent.name)
        if model is None:
            return job
        begun = (identity_of(job.folder) or {}).get(PRECISION)
        kept = [word for word in job.overrides if not word.startswith(f"{PRECISION}=")]
        found = begun or self._precision(model, job)
        return replace(job, overrides=[*kept, f"{PRECISION}={found}"])

    def _precision(self, model: ModelSource, job: StudyJob) -> str:
        """Return what auto is in this study for the model of a run, on whatever machine."""
        file = self.folder / PRECISIONS
        name = str(getattr(model, "path", None) or model.name)
        known = read_json(file, dict[str, str]) if file.exists() else {}
        if name not in known:
            try:
                known[name] = found_precision(model, job.overrides, self.environment)
            except InputError:  # such as a model that is not there: the runs say why they fail
                return AUTO
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, as_json(known))
        return known[name]

    def _report(self, job: StudyJob, seconds: float, done: int, count: int, elapsed: float) -> None:
        """Log how a run ended, and how many remain."""
        name, left = job.folder.relative_to(self.folder), count - done
        rest = f"; {left} left, about {duration(elapsed / done * left)}" if left else ""
        if not is_whole(job.folder):
            logger.warning("[%d/%d] %s failed, see %s%s", done, count, name, job.log, rest)
            return
        score, took = score_line(job), duration(seconds)
        logger.info("[%d/%d] %s: %s, %s%s", done, count, name, score, took, rest)

    def _units(self, due: list[StudyJob]) -> list[list[StudyJob]]:
        """Return the jobs by process: one for each, or all of a method that train together."""
        if self.together == 1:
            return [[job] for job in due]
        units: dict[Path, list[StudyJob]] = {}
        for job in due:
            units.setdefault(job.folder.parent, []).append(job)
        return list(units.values())

    def _train_unit(self, jobs: list[StudyJob]) -> list[tuple[StudyJob, float]]:
        """Train the runs of one process; return each with the seconds of that process.

        The part of one run is not known where several train in one pass.
        """
        self._written.update((job.log, job.log.stat().st_size) for job in jobs if job.log.exists())
        if self.together == 1:
            return [self._train(job) for job in jobs]
        described = [{"overrides": job.overrides, "log": str(job.log)} for job in jobs]
        runs = as_json(Runs(together=self.together, runs=described))
        seconds = self._start(jobs[0], [*TOGETHER, *config_dir_words()], runs)
        return [(job, seconds) for job in jobs]

    def _train(self, job: StudyJob) -> tuple[StudyJob, float]:
        """Train one run in a process of its own; return the job and its seconds."""
        self._begin(job)
        start = time.monotonic()
        process = self._idle.pop() if self._idle else self._new_process()
        try:
            process.run([*config_dir_words(), *job.overrides], job.log)
        finally:
            self._idle.append(process)
        return job, time.monotonic() - start

    @cached_property
    def _forking(self) -> list[ForkedRuns]:
        """The processes that fork runs, at most one for each of those at a time."""
        return []

    @cached_property
    def _idle(self) -> list[ForkedRuns]:
        """Those of them that have no run now."""
        return []

    def _new_process(self) -> ForkedRuns:
        self._forking.append(ForkedRuns(self.environment))
        return self._forking[-1]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of runs."""
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))  # all cores, among the jobs
        return {"OMP_NUM_THREADS": threads, **os.environ}  # a user's setting wins

    def _begin(self, job: StudyJob) -> None:
        """Say that a run begins, and create the folder of its log."""
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s: started, log: %s", job.folder.relative_to(self.folder), job.log)

    def _start(self, job: StudyJob, line: list[str], given: str) -> float:
        """Run a process whose output goes to the log of a job; return its seconds.

        Args:
            given: the standard input.
        """
        self._begin(job)
        start = time.monotonic()
        with append_to(job.log) as log:  # appended: a resumed run keeps its earlier output
            # no check of the status: is_finished tells whether the run succeeded
            subprocess.run(
                line,
                env=self.environment,
                input=given.encode(),
                stdout=log,
                stderr=log,
                check=False,
            )
        return time.monotonic() - start


def told_apart(best: Qualities, other: Qualities) -> bool:
    """Return True if the scores of the best rate are above those of another by what seeds vary.

    That is, if the mean of the differences is more than its standard error (the one-standard-error
    rule of Breiman et al. 1984); of one seed, if they differ. Where all scores are equal, the
    losses are compared so.
    """
    gains = [[b - o for b, o in zip(best[s], other[s], strict=True)] for s in best if s in other]
    metric, loss = zip(*gains, strict=True)
    differences = metric if any(metric) else loss
    if len(differences) == 1 or not all(map(math.isfinite, differences)):
        return max(differences) > 0  # also of a loss that is not known
    mean = statistics.fmean(differences)
    return mean > statistics.stdev(differences) / math.sqrt(len(differences))


def refuse_other(job: StudyJob, existing: Record) -> None:
    """Raise InputError if the run in the folder of a job has settings of another study.

    The learning rate may differ: it depends on the scores of the tuning runs.
    """
    now = as_begun(existing, identity(read_config(compose(job.overrides)).resolved))
    others = differences(existing, {**now, "train.lr": existing.get("train.lr")})
    if others:
        raise InputError(
            f"{job.folder} belongs to another study ({summary(others)}): use the same settings, "
            "or another folder"
        )


def score_line(job: StudyJob) -> str:
    """Return the score of a finished run as text."""
    scores = job.scores
    metric, after = scores["metric"], scores["after"]
    if after is None:
        return f"validation {metric} {scores['validation']:.4f}"
    return f"test {metric} {after[metric]:.4f}"


def slug(name: str) -> str:
    """Return a name that can be the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", name)
