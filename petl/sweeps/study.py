"""A study: several methods, each at the learning rate that suits it, over several seeds.

    tune/NAME/lr-RATE/   score rates on held-out train rows; the test rows are left alone
    runs/NAME/seed-S/    the best rate of each, scored on the test rows
    *.log                beside each run: what it printed
    rates.json           the validation score of each rate, and the rate that was taken

Each run is a `train.py` of its own. What is finished stays: the same command goes on where a
stopped study was.
"""

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petl.config.compose import compose
from petl.config.method_fields import with_inner
from petl.config.schema import plain
from petl.errors import InputError, RunStopped
from petl.files.disk import as_json, replace
from petl.reports.formatting import duration
from petl.runs.resume import SCORES, differences, identity, identity_of, is_finished
from petl.runs.run_config import read_config

TRAIN = Path(__file__).parents[2] / "train.py"
RATES = "rates.json"
AT_THE_END = 10**9  # train.eval_steps: the last step is evaluated in any case
TUNING_SEED = 0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """A method with what is special about its runs: "binary method.inner=lora" in words."""

    words: str

    @property
    def name(self) -> str:
        """For folders and tables: "binary inner=lora"."""
        return self.words.replace("method.", "")

    @property
    def overrides(self) -> list[str]:
        method, *others = self.words.split()
        return [f"+method={method}", *others]


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    folder: Path
    overrides: list[str]

    @property
    def scores(self) -> dict[str, Any]:
        return json.loads((self.folder / SCORES).read_text())

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        folder: of the study.
        contenders: at least one.
        rates: learning rates to choose from; with one nothing is tuned, and with none each run has
            the rate that suits its method.
        overrides: of every run, as after `train.py`.
        jobs: runs at a time.
    """

    folder: Path
    contenders: list[Contender]
    seeds: list[int]
    rates: list[float]
    overrides: list[str] = field(default_factory=list)
    jobs: int = 1

    def run(self) -> None:
        """Make every run that is not finished.

        Raises:
            InputError: settings that no run could have, or a folder that holds another study.
            RunStopped: runs on the test rows failed, or all that tune one method; the message names
                their logs.
        """
        self._check()
        if len(self.rates) > 1:
            self._make([self._tuning(c, rate) for c in self.contenders for rate in self.rates])
        chosen = {contender: self.best_rate(contender) for contender in self.contenders}
        failed = self._make(
            [self._final(c, seed, rate) for c, rate in chosen.items() for seed in self.seeds]
        )
        if failed:
            logs = ", ".join(str(job.log) for job in failed)
            raise RunStopped(f"{len(failed)} runs failed, see {logs}; the same command goes on")

    # The runs

    def _tuning(self, contender: Contender, rate: float) -> Job:
        steps = [f"train.eval_steps={AT_THE_END}", "train.test=false", f"train.seed={TUNING_SEED}"]
        folder = self.folder / "tune" / slug(contender.name) / f"lr-{rate:g}"
        return self._job(folder, contender, [*steps, f"train.lr={rate:g}"])

    def _final(self, contender: Contender, seed: int, rate: float | None) -> Job:
        folder = self.folder / "runs" / slug(contender.name) / f"seed-{seed}"
        first = contender is self.contenders[0]  # the linear probe is the same for all
        heads = [] if first else ["train.linear_probe=false"]
        rates = [] if rate is None else [f"train.lr={rate:g}"]
        return self._job(folder, contender, [*heads, f"train.seed={seed}", *rates])

    def _job(self, folder: Path, contender: Contender, more: Sequence[str]) -> Job:
        quoted = str(folder).replace("'", r"\'")
        where = [f"train.run='{quoted}'", "train.resume=auto", "train.keep_checkpoints=1"]
        return Job(folder, [*contender.overrides, *self.overrides, *more, *where])

    def best_rate(self, contender: Contender) -> float | None:
        """The rate whose run did best on the held-out rows, noted in rates.json; None: no choice.

        Raises:
            RunStopped: no rate gave a finished run.
        """
        if len(self.rates) < 2:
            return next(iter(self.rates), None)
        tried = {rate: self._tuning(contender, rate) for rate in self.rates}
        found = {rate: job.scores for rate, job in tried.items() if is_finished(job.folder)}
        if not found:
            raise RunStopped(f"{contender.name}: no learning rate gave a finished run", status=1)
        sign = 1 if next(iter(found.values()))["higher_is_better"] else -1
        best = max(found, key=lambda rate: (sign * found[rate]["validation"], -rate))
        scores = {f"{rate:g}": scores["validation"] for rate, scores in found.items()}
        known = self.tried | {contender.name: {"validation": scores, "taken": best}}
        replace(self.folder / RATES, as_json(known))
        return best

    @property
    def tried(self) -> dict[str, Any]:
        """By contender, the validation score of each rate and the rate that was taken."""
        file = self.folder / RATES
        return json.loads(file.read_text()) if file.exists() else {}

    # Making them

    def _check(self) -> None:
        """Raise InputError for what would stop a run at its start, or mix two studies."""
        names = [slug(contender.name) for contender in self.contenders]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{name} is in the study twice; name it once")
        for contender in self.contenders:
            jobs = [self._tuning(contender, rate) for rate in self.rates]
            jobs += [self._final(contender, seed, None) for seed in self.seeds]
            read_config(compose(jobs[-1].overrides))
            for job in jobs:
                then = identity_of(job.folder)
                if then is not None:
                    refuse_other(job, then)

    def _make(self, jobs: list[Job]) -> list[Job]:
        """Run what is not finished, `self.jobs` at a time; those that failed."""
        due = [job for job in jobs if not is_finished(job.folder)]
        if len(due) < len(jobs):
            logger.info("%d of %d runs are finished already", len(jobs) - len(due), len(jobs))
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for i, (job, seconds) in enumerate(pool.map(self._train, due), start=1):
                    name = job.folder.relative_to(self.folder)
                    if is_finished(job.folder):
                        logger.info(
                            "[%d/%d] %s: %s, %s", i, len(due), name, said(job), duration(seconds)
                        )
                    else:
                        logger.warning("[%d/%d] %s failed, see %s", i, len(due), name, job.log)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [job for job in due if not is_finished(job.folder)]

    def _train(self, job: Job) -> tuple[Job, float]:
        """Make one run in a process of its own; how long it took."""
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        began = time.monotonic()
        with job.log.open("a") as log:
            line = [sys.executable, str(TRAIN), *job.overrides]
            subprocess.run(line, env=environment, stdout=log, stderr=log, check=False)
        return job, time.monotonic() - began


def refuse_other(job: Job, then: Mapping[str, Any]) -> None:
    """Raise InputError if the folder of a job holds a run of other settings, the rate aside."""
    settings = plain(compose(job.overrides))
    now = identity({**settings, "method": with_inner(settings["method"])})
    others = differences(then, {**now, "train.lr": then.get("train.lr")})
    if others:
        raise InputError(
            f"{job.folder} is of another study: {', '.join(others[:3])}; give its settings, or "
            "choose another folder"
        )


def said(job: Job) -> str:
    """The score of a finished run in words."""
    scores = job.scores
    metric, after = scores["metric"], scores["after"]
    if after is None:
        return f"validation {metric} {scores['validation']:.4f}"
    return f"test {metric} {after[metric]:.4f}"


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name)
