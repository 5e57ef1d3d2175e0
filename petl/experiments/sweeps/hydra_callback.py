"""Hydra callback of a sweep: check its settings, say how far it is, report the best setting.

Hydra calls `SweepSummaryCallback`, see `hydra.callbacks` in configs/train.yaml. What needs torch is
imported when a run has imported it.
"""

import logging
import sys
from pkgutil import resolve_name

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from petl.data.tasks import TASKS
from petl.errors import InputError, RunStopped
from petl.experiments.reports.formatting import count_text
from petl.experiments.sweeps.progress import SweepProgress, is_launched
from petl.system.processes import is_first, refuse_processes
from petl.system.settings.command_line import is_optuna
from petl.training import program as app

HERE = "petl.experiments.sweeps"
logger = logging.getLogger(__name__)


class SweepSummaryCallback(Callback):
    """Says how far a sweep is, and the best setting at its end, even if some runs failed.

    Attributes:
        jobs: the overrides of each run so far.
        finished: number of finished runs.
        argv: the command line of the sweep.
        in_worker: True in the copy of a process in which a launcher runs a job.
        progress: of runs that are made in this process one by one; else None.
    """

    def __init__(self) -> None:
        self.jobs: list[list[str]] = []
        self.finished = 0
        self.argv, self.in_worker = list(sys.argv), False
        self.progress: SweepProgress | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        # launchers pickle the callbacks together with the job
        self.__dict__ = state | {"in_worker": True}

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Check the settings of the sweep, choose its launcher, and schedule the report."""
        HydraConfig.instance().set_config(config)  # Hydra unsets it between runs
        try:
            if is_optuna():
                check(config)
                quieten_optuna()
            together = config.train.together  # not checked yet: each run does that
            is_together = isinstance(together, int) and together > 1
            if is_together:
                resolve_name(f"{HERE}.together_launcher:launch_together")(config)
        except InputError as error:
            raise app.WrappedError(error) from error  # Hydra ignores an Exception of a callback
        if is_launched(config):
            watch = resolve_name(f"{HERE}.launched_jobs:JobWatch")(config)
            app.closing.append(lambda: self.jobs.extend(job["overrides"] for job in watch.stop()))
        elif not is_together and is_first():
            self.progress = SweepProgress(config)
            app.closing.append(self.progress.close)
        # behind the callbacks above, of which one completes `self.jobs`
        app.closing.append(lambda: self.report_best(config))

    def on_job_start(self, config: DictConfig, **_: object) -> None:
        """Prepare the process of a launched job."""
        if self.in_worker:
            self.worker = resolve_name(f"{HERE}.launched_jobs:Worker")(config, self.argv)
        elif self.progress is not None:
            self.progress.start(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: object) -> None:
        """Record a run; raise after the last trial if none of them finished."""
        if self.in_worker:
            self.worker.end(job_return)
            return
        self.jobs.append(list(job_return.overrides or ()))
        self.finished += job_return.status == JobStatus.COMPLETED
        if self.progress is not None:
            self.progress.end(job_return)
        # the Optuna sweeper would fail without a finished trial, with a traceback
        if is_optuna() and not self.finished and len(self.jobs) == config.hydra.sweeper.n_trials:
            trials = count_text(len(self.jobs), "trial")
            raise app.WrappedError(RunStopped(f"none of {trials} finished; see the errors above"))

    def report_best(self, config: DictConfig) -> None:
        """Log the best setting."""
        if not self.finished and not is_launched(config):  # then torch is not imported either
            return
        from petl.experiments.sweeps.best_setting import lines_of

        for line in lines_of(config, self.jobs):
            logger.info("%s", line)


def check(config: DictConfig) -> None:
    """Check the settings of an Optuna search.

    Raises:
        InputError: it would search for the worst score or on the test examples, or propose other
            values to each process.
    """
    task, direction = resolve_name(TASKS[config.data.task]), config.hydra.sweeper.direction
    if config.train.eval_steps is None:
        raise InputError(
            "train.eval_steps=null: the search would choose by scores on the test examples of "
            f"{task.name}; set train.eval_steps, the number of steps between evaluations on "
            "validation examples"
        )
    wanted = "maximize" if task.higher_is_better else "minimize"
    if direction != wanted:
        raise InputError(
            f"hydra.sweeper.direction={direction} would search for the worst {task.metric} of "
            f"{task.name}; set hydra.sweeper.direction={wanted}"
        )
    refuse_processes(
        "Optuna would propose different values to each process; run the search with one process, "
        "and start it in several shells for several workers"
    )


def quieten_optuna() -> None:
    """Log like petl: Optuna's own handler writes color codes even into files."""
    import optuna

    optuna.logging.disable_default_handler()
    log, handler = logging.getLogger("optuna"), app.StandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.getLogger("petl").level)
