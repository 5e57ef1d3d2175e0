"""Hydra launcher of a sweep with `train.together=K`: K runs at a time, trained over one base.

Each run has its log in SWEEP/jobs, see petl/training/together/runs.py.
"""

import inspect
import logging
import signal
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from petl.errors import InputError, RunStopped, shortened
from petl.experiments.sweeps.launched_jobs import described, folder_of
from petl.experiments.sweeps.progress import BASIC
from petl.system.processes import refuse_processes
from petl.system.settings.command_line import how_to_resume_sweep, is_optuna
from petl.training import program as app

if TYPE_CHECKING:
    from petl.training.together.runs import RunJob
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
    """Makes the runs of a sweep in this process, whose adapters train together."""

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
            WrappedError: a signal ended them.
        """
        # imports torch, which the check of a sweep's settings does not need
        from petl.training.together.runs import RunJob, train_runs

        folder = folder_of(self.config)
        folder.mkdir(parents=True, exist_ok=True)
        start = inspect.unwrap(self.task)
        jobs, configs = [], []
        for number, words in enumerate(job_overrides, start=initial_job_idx):
            config = self._config(number, words)
            own, log = list(config.hydra.overrides.task), folder / f"{number}.log"
            logger.info("job %d: %s (log: %s)", number, " ".join(own), log)
            jobs.append(RunJob(own, partial(settings_of, config), log, start))
            configs.append(config)
        signalled = train_runs(jobs, self.config.train.together)
        if signalled:
            # what each run says of its checkpoint is in its log
            ended = "interrupted" if signalled == signal.SIGINT else "terminated"
            message = f"{ended}; {how_to_resume_sweep()}"
            raise app.WrappedError(RunStopped(message, status=app.SIGNALLED + signalled))
        returns = []
        for job, config, words in zip(jobs, configs, job_overrides, strict=True):
            returned = JobReturn(overrides=words, cfg=settings_of(config))
            try:
                returned.return_value, returned.status = result_of(job), JobStatus.COMPLETED
                said = described(returned.cfg)
            except (InputError, RunStopped) as error:
                ended = RunStopped(f"job {config.hydra.job.num} failed, see above")
                returned.return_value, returned.status = ended, JobStatus.FAILED
                said = f"failed: {shortened(str(error))}"
            logger.info("job %d %s", config.hydra.job.num, said)
            self.context.callbacks.on_job_end(config=config, config_name=None, job_return=returned)
            returns.append(returned)
        return returns

    def _config(self, number: int, words: Sequence[str]) -> DictConfig:
        """Return the settings of a job, and Hydra's own."""
        config = self.context.config_loader.load_sweep_config(self.config, list(words))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config


def settings_of(config: DictConfig) -> DictConfig:
    """Return the settings of a job without Hydra's own, to which they may refer."""
    HydraConfig.instance().set_config(config)
    settings = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.resolve(settings)
    return settings


def result_of(job: "RunJob") -> float:
    """Return the objective of a run.

    Raises:
        InputError: its settings are wrong.
        RunStopped: it failed, or it is a trial without a score.
    """
    if isinstance(job.error, InputError | RunStopped):
        raise job.error
    if job.error is not None or job.result is None:
        raise RunStopped(f"{job.error!r}, see {job.log}") from job.error
    return app.scored(job.result)
