"""What a sweep says of its runs while they are made in this process; imports no torch."""

import logging
import math
import time
from collections.abc import Iterator
from pkgutil import resolve_name

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from petl.experiments.reports.formatting import count_text, duration
from petl.system.settings.command_line import how_to_resume_sweep, is_optuna

# of Hydra, which makes the runs of a sweep in this process
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
logger = logging.getLogger(__name__)


def is_launched(config: DictConfig) -> bool:
    """True if the jobs of this sweep run in other processes."""
    return config.hydra.launcher._target_ != BASIC


def words_of(config: DictConfig) -> Iterator[Override]:
    """Yield the overrides of a sweep."""
    params = (OmegaConf.select(config, "hydra.sweeper.params") or {}).items()
    words = [*config.hydra.overrides.task, *(f"{key}={value}" for key, value in params)]
    yield from OverridesParser.create().parse_overrides(words)


def fixed_settings(config: DictConfig) -> set[str]:
    """The settings that the command line gives one value for all jobs."""
    return {word.get_key_element() for word in words_of(config) if not word.is_sweep_override()}


def count_runs(config: DictConfig) -> int | None:
    """Return the number of runs; None if the values are not listed, as of names by a pattern."""
    if is_optuna():
        return config.hydra.sweeper.n_trials
    swept = [word for word in words_of(config) if word.is_sweep_override()]
    listed = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)
    if not all(word.value_type in listed for word in swept):
        return None
    return math.prod(sum(1 for _ in word.sweep_string_iterator()) for word in swept)


class SweepProgress:
    """Says which run begins, how each has ended, and how many are left."""

    def __init__(self, config: DictConfig) -> None:
        self.fixed, self.count = fixed_settings(config), count_runs(config)
        self.begun, self.done, self.failed = time.monotonic(), 0, 0
        runs = "runs" if self.count is None else count_text(self.count, "run")
        logger.info("sweep: %s, one after the other in this process", runs)

    def start(self, config: DictConfig) -> None:
        """Say that a run begins."""
        words = config.hydra.overrides.task
        own = [word for word in words if word.partition("=")[0] not in self.fixed]
        logger.info("%s started: %s", self._name, " ".join(own or words))

    @property
    def _name(self) -> str:
        of = "" if self.count is None else f"/{self.count}"
        return f"[{self.done + 1}{of}]"

    def end(self, job: JobReturn) -> None:
        """Say how a run ended, and how many remain."""
        name, failed = self._name, job.status == JobStatus.FAILED
        result = "failed, see above"
        if not failed:  # the run has imported torch, as this module does
            result = resolve_name("petl.experiments.sweeps.launched_jobs:described")(job.cfg)
        self.done, self.failed = self.done + 1, self.failed + failed
        # a run that failed at once says nothing of the time of others
        left = 0 if self.count is None else self.count - self.done
        rest = f"; {left} left" if left else ""
        if left and self.done > self.failed:
            each = (time.monotonic() - self.begun) / self.done
            rest += f", about {duration(each * left)}"
        logger.info("%s %s%s", name, result, rest)

    def close(self) -> None:
        """Say how runs that failed are made again."""
        if self.failed:
            runs = count_text(self.done, "run")
            logger.info("%d of %s failed; %s", self.failed, runs, how_to_resume_sweep())
