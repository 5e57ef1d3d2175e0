"""What a sweep says besides its runs: what is wrong with it at the start, the best run at the end.

Hydra calls `Closing`: see `hydra.callbacks` in configs/train.yaml.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from petl.cli import app
from petl.config.command_line import is_optuna
from petl.config.compose import compose
from petl.errors import InputError, RunStopped
from petl.reports.summary import shown
from petl.runs.resume import finished_run, identity, objective_of, read_scores
from petl.runs.run_config import read_config
from petl.tasks import TASKS

RESULTS = "optimization_results.yaml"  # which the sweeper of Optuna writes
logger = logging.getLogger(__name__)


class Closing(Callback):
    """Names the best run at the end of a sweep, whether or not all of them went well.

    Attributes:
        jobs: the overrides of each run so far.
        finished: how many of them were finished.
    """

    def __init__(self) -> None:
        self.jobs: list[list[str]] = []
        self.finished = 0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        HydraConfig.instance().set_config(config)  # between runs, too, this is a sweep
        if is_optuna():
            try:
                check(config)
            except InputError as error:
                raise app.Passing(error) from error  # Hydra would go on after any other
            quieten_optuna()
        app.closing.append(lambda: self.tell(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        self.jobs.append(list(job_return.overrides or ()))
        self.finished += job_return.status == JobStatus.COMPLETED
        if is_optuna() and not self.finished and len(self.jobs) == config.hydra.sweeper.n_trials:
            raise app.Passing(RunStopped("none of these trials was finished; see why above"))

    def tell(self, config: DictConfig) -> None:
        """Log the closing words."""
        results = Path(config.hydra.sweep.dir) / RESULTS
        candidates = others = self.jobs
        if is_optuna() and results.is_file():  # the best of all trials, which others may have made
            best = OmegaConf.load(results).best_params
            others = [[word for word in self.jobs[-1] if word.partition("=")[0] not in best]]
            candidates = [[*others[0], *(f"{key}={value}" for key, value in best.items())]]
        for line in closing_words(candidates, others, config.train.output):
            logger.info("%s", line)


def check(config: DictConfig) -> None:
    """Refuse a search by Optuna that would look for the worst, or try other things in each process.

    Raises:
        InputError: it would.
    """
    task, direction = TASKS[config.data.task], config.hydra.sweeper.direction
    wanted = "maximize" if task.higher_is_better else "minimize"
    if direction != wanted:
        raise InputError(
            f"hydra.sweeper.direction={direction} would look for the worst {task.metric} of "
            f"{task.name}; add hydra.sweeper.direction={wanted}"
        )
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise InputError(
            f"Optuna would propose other values to each of these {processes} processes; give the "
            "search one process, and start it in several shells to have several workers"
        )


def quieten_optuna() -> None:
    """Have Optuna log as petl does: its own handler writes colours wherever its output goes."""
    import optuna

    optuna.logging.disable_default_handler()
    log, handler = logging.getLogger("optuna"), app.StandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.getLogger("petl").level)


def closing_words(
    candidates: Sequence[list[str]], others: Sequence[list[str]], output: str
) -> Iterator[str]:
    """The best run that has one of these overrides; nothing if none has been made in `output`.

    Of its overrides those are told that one of `others` lacks.
    """
    made = [(job, run) for job in candidates if (run := run_with(job, output)) is not None]
    if not made:
        return
    scores = {str(run): read_scores(run) for _, run in made}
    first = next(iter(scores.values()))
    sign = 1 if first["higher_is_better"] else -1
    words, run = max(made, key=lambda pair: sign * objective_of(scores[str(pair[1])]))
    best = scores[str(run)]
    rows = "the test rows" if best["validation"] is None else "held-out train rows"
    told = " ".join(word for word in words if any(word not in other for other in others))
    reached = f"{best['metric']} {shown(best['metric'], objective_of(best))} on {rows}"
    yield f"best of the sweep: {told + ': ' if told else ''}{reached}"
    yield f"its run: {run}"
    yield f"all runs side by side: petl compare {output}"


def run_with(overrides: list[str], output: str) -> Path | None:
    """The finished run that has these overrides, in this folder of runs."""
    try:
        return finished_run(output, identity(read_config(compose(overrides)).resolved))
    except InputError:  # settings that no run could have, as was said when it was tried
        return None
