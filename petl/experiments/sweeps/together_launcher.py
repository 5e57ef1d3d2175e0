"""Hydra launcher of a sweep with `train.together=K`: K runs at a time, trained over one base.

The runs are threads of this process (petl/training/together/lanes.py). Each has its record and its
log in SWEEP/jobs, as one that another launcher starts in a process of its own.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from functools import partial

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from petl.errors import InputError, RunStopped
from petl.experiments.sweeps.launched_jobs import BASIC, Worker, folder_of
from petl.system.processes import refuse_processes
from petl.system.settings.command_line import how_to_resume_sweep, is_optuna
from petl.training import program as app

logger = logging.getLogger(__name__)


def launch_together(config: DictConfig) -> None:
    """Make `TogetherLauncher` the launcher of a sweep that is about to start.

    Raises:
        InputError: the sweep has another launcher, several processes, or an Optuna search that
            proposes fewer runs at a time.
    """
    together, launcher = config.train.together, config.hydra.launcher._target_
    if launcher != BASIC:
        raise InputError(
            f"train.together={together} trains runs in this process, and hydra.launcher starts "
            f"others ({launcher}); leave one of them out"
        )
    refuse_processes(
        f"train.together={together} needs one process; start the sweep without torchrun"
    )
    if is_optuna() and config.hydra.sweeper.n_jobs < together:
        raise InputError(
            f"train.together={together}, but Optuna proposes "
            f"hydra.sweeper.n_jobs={config.hydra.sweeper.n_jobs} runs at a time; set "
            f"hydra.sweeper.n_jobs={together}"
        )
    # Hydra refuses plugins outside of a package of its own, so it finds this one by another's name
    Plugins.instance().class_name_to_class[BASIC] = TogetherLauncher


class TogetherLauncher(Launcher):
    """Makes the runs of a sweep in threads of this process, whose adapters train together."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra gives to a launcher."""
        Plugins.instance().register(BasicLauncher)  # for later sweeps of this process
        self.context, self.task, self.config = hydra_context, task_function, config
        logger.info("the jobs of this sweep and their logs: %s", folder_of(config))

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Make the runs of a batch; return their results in the same order.

        Raises:
            Passing: a signal ended them.
        """
        # imports torch, which the check of a sweep's settings does not need
        from petl.training.together.engine import run_in_lanes

        results: dict[int, JobReturn] = {}
        jobs = [
            partial(self._make, number, list(words), results)
            for number, words in enumerate(job_overrides, start=initial_job_idx)
        ]
        signalled = run_in_lanes(self.config.train.together, jobs)
        if signalled:
            # what each run says of its checkpoint is in its log
            ended = "interrupted" if signalled == signal.SIGINT else "terminated"
            message = f"{ended}; {how_to_resume_sweep()}"
            raise app.Passing(RunStopped(message, status=app.SIGNALLED + signalled))
        return [results[number] for number in sorted(results)]

    def _make(self, number: int, words: list[str], results: dict[int, JobReturn]) -> None:
        """Make one run, whose error ends no other."""
        config = self.context.config_loader.load_sweep_config(self.config, words)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        settings = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        job = JobReturn(overrides=words, cfg=settings, status=JobStatus.COMPLETED)
        worker = Worker(config, sys.argv)
        try:
            job.return_value = self.task(settings)
        except (Exception, app.Passing) as error:
            job.status = JobStatus.FAILED
            job.return_value = error.error if isinstance(error, app.Passing) else error
        worker.end(job)
        # on the terminal again: `end` has restored the streams
        logger.info("job %d %s", number, worker.job["result"])
        self.context.callbacks.on_job_end(config=config, config_name=None, job_return=job)
        results[number] = job
