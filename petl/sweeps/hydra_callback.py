"""Hydra callback of a sweep: check its settings at the start, report the best run at the end.

Hydra calls `Closing`, see `hydra.callbacks` in configs/train.yaml.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from petl.cli import app
from petl.config.command_line import is_optuna
from petl.config.compose import compose
from petl.errors import InputError, RunStopped
from petl.files.read import read_yaml
from petl.reports.formatting import score as format_score
from petl.runs.records import read_results
from petl.runs.resume import finished_run, identity, objective_of
from petl.runs.run_config import read_config
from petl.tasks import TASKS

RESULTS = "optimization_results.yaml"  # written by the Optuna sweeper
logger = logging.getLogger(__name__)


class Optimum(TypedDict):
    """The content of `RESULTS` that is used here."""

    best_params: dict[str, Any]


class Closing(Callback):
    """Reports the best run at the end of a sweep, even if some runs failed.

    Attributes:
        jobs: the overrides of each run so far.
        finished: number of finished runs.
    """

    def __init__(self) -> None:
        self.jobs: list[list[str]] = []
        self.finished = 0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the settings of an Optuna search, and schedule the report."""
        HydraConfig.instance().set_config(config)  # Hydra unsets it between runs
        if is_optuna():
            try:
                check(config)
            except InputError as error:
                raise app.Passing(error) from error  # Hydra ignores an Exception of a callback
            quieten_optuna()
        app.closing.append(lambda: self.report_best(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Record a run; raise after the last trial if none of them finished."""
        self.jobs.append(list(job_return.overrides or ()))
        self.finished += job_return.status == JobStatus.COMPLETED
        # the Optuna sweeper would fail without a finished trial, with a traceback
        if is_optuna() and not self.finished and len(self.jobs) == config.hydra.sweeper.n_trials:
            raise app.Passing(
                RunStopped(f"none of the {len(self.jobs)} trials finished; see the errors above")
            )

    def report_best(self, config: DictConfig) -> None:
        """Log the best run."""
        results = Path(config.hydra.sweep.dir) / RESULTS
        candidates = others = self.jobs
        if is_optuna() and results.is_file():  # of all trials, also those of other workers
            best = read_yaml(results, Optimum)["best_params"]
            others = [[word for word in self.jobs[-1] if word.partition("=")[0] not in best]]
            candidates = [[*others[0], *(f"{key}={value}" for key, value in best.items())]]
        for line in best_run_lines(candidates, others, config.train.output):
            logger.info("%s", line)


def check(config: DictConfig) -> None:
    """Check the settings of an Optuna search.

    Raises:
        InputError: it would search for the worst score, or propose other values to each process.
    """
    task, direction = TASKS[config.data.task], config.hydra.sweeper.direction
    wanted = "maximize" if task.higher_is_better else "minimize"
    if direction != wanted:
        raise InputError(
            f"hydra.sweeper.direction={direction} would search for the worst {task.metric} of "
            f"{task.name}; set hydra.sweeper.direction={wanted}"
        )
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise InputError(
            f"WORLD_SIZE={processes}: Optuna would propose different values to each process; run "
            "the search with one process, and start it in several shells for several workers"
        )


def quieten_optuna() -> None:
    """Log like petl: Optuna's own handler writes color codes even into files."""
    import optuna

    optuna.logging.disable_default_handler()
    log, handler = logging.getLogger("optuna"), app.StandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.getLogger("petl").level)


def best_run_lines(
    candidates: Sequence[list[str]], others: Sequence[list[str]], output: str
) -> Iterator[str]:
    """Yield lines about the best of the finished runs with these overrides; none without a run.

    Args:
        candidates: overrides of the runs.
        others: overrides to compare with: those that all of these have are not printed.
        output: the folder of the runs.
    """
    runs = [(job, run) for job in candidates if (run := run_with(job, output)) is not None]
    if not runs:
        return
    scores = {str(run): read_results(run) for _, run in runs}
    first = next(iter(scores.values()))
    # all runs of a sweep have one task, so one direction
    sign = 1 if first["higher_is_better"] else -1
    words, run = max(runs, key=lambda pair: sign * objective_of(scores[str(pair[1])]))
    best = scores[str(run)]
    split = "test" if best["validation"] is None else "validation"
    settings = " ".join(word for word in words if any(word not in other for other in others))
    value = format_score(best["metric"], objective_of(best))
    settings = f"{settings}: " if settings else ""
    yield f"best run of the sweep: {settings}{split} {best['metric']} {value}"
    yield f"its folder: {run}"
    yield f"to compare all runs: petl compare {output}"


def run_with(overrides: list[str], output: str) -> Path | None:
    """Return the finished run with these overrides in this folder of runs, if there is one."""
    try:
        return finished_run(output, identity(read_config(compose(overrides)).resolved))
    except InputError:  # invalid settings, reported when the run was started
        return None
