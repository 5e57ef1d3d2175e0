"""Runs of `petl train` that train together in one process, each with its folder, log and random
numbers.

A run is data, `RunJob`, and its work: a generator that waits for the steps of its loop. The work of
one run at a time goes on, until each waits for steps; those are made for all, see driver.py. When
one has a checkpoint to write, or ends, all write theirs, so that those that are resumed continue
from the same step of the group: their passes have the same rows as if nothing had stopped them.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from petl.efficiency.together.batches import Batch, check_loss, tokens_of
from petl.efficiency.together.group import Member
from petl.errors import InputError, JobSkipped, RunStopped, UnsupportedError
from petl.system.files.disk import append_text
from petl.system.output import written_to
from petl.system.processes import StopRequest, explain_process_failures, release_all
from petl.system.settings.command_line import as_run, how_to_resume
from petl.training import program as app
from petl.training.dataloader import FirstBatches
from petl.training.distributed.precision import device_of_run
from petl.training.loop import Loop, Stepwise
from petl.training.runs.checkpoint import checkpoints, read_state
from petl.training.runs.resume import begun_precision, identity
from petl.training.runs.run_config import read_config
from petl.training.runs.run_folder import Run
from petl.training.together.driver import Together, Training
from petl.training.wrapping import Bases

logger = logging.getLogger(__name__)


class RunJob(Training):
    """A run among others.

    Args:
        words: the command line of the run alone, after `petl train`.
        compose: returns its composed settings.
        log: the file for its output.
        start: begins the work of a run of these settings, with the weights that bases share.

    Attributes:
        precision: of its passes, "no" or "bf16", which runs that share them have in common.
        run: once its folder is chosen.
        loop: once its steps are to be made.
        result: the objective of the finished run; None: it has none yet.
    """

    def __init__(
        self,
        words: Sequence[str],
        compose: Callable[[], DictConfig],
        log: Path,
        start: Callable[[DictConfig, Bases], Stepwise[float]],
    ) -> None:
        self.words, self.log, self.start = [*words], log, start
        super().__init__(device_of_run())
        self._work: Stepwise[float] | None = None
        self.run: Run | None = None
        self.loop: Loop | None = None
        self.result: float | None = None
        with self.own():
            self.cfg = compose()
            # auto, and what the type of the model needs, are values like others; a run that is
            # resumed keeps what auto was for it, maybe on another machine
            config = read_config(self.cfg)
            begun = begun_precision(config.train, identity(config.resolved))
            self.precision = begun or config.precision

    @property
    def is_over(self) -> bool:
        """True once there is nothing left to do."""
        return self.error is not None or self.result is not None

    # The work

    @contextmanager
    def own(self) -> Generator[None]:
        """Inside the block, work for this run; an error ends the run, and not the block's caller.

        Locks, the recorded command and random numbers are those of the run, and output goes to its
        log.
        """
        with (
            append_text(self.log) as log,
            written_to(log),
            as_run(self.words),
            self.random.drawn(),
        ):
            try:
                with explain_process_failures():
                    yield
            except JobSkipped as skipped:
                logger.info("%s", skipped)
                self.result = skipped.objective
            except Exception as error:
                self._fail(error)
            if self.is_over:
                release_all()

    def _fail(self, error: Exception) -> None:
        self.error = error

        def report() -> None:
            raise error

        try:
            app.reported(report)
        except Exception:  # a bug, whose traceback is as in a process of its own
            app.print_traceback(type(error), error, error.__traceback__)
        if self._work is not None:
            with suppress(Exception):
                self._work.throw(error)  # its blocks end by the error

    def open(self, bases: Bases) -> None:
        """Choose the run's folder and its checkpoint."""
        with self.own():
            self._work = self.start(self.cfg, bases)
            self._go_on()

    def prepare(self) -> None:
        """Do all that comes before the steps, inside `own`."""
        self._go_on()
        if self.loop is not None:
            self._share_passes(self.loop)

    def finish(self) -> None:
        """Do all that comes after the steps, inside `own`."""
        self._go_on()

    def leave(self) -> None:
        """End without a result, inside `own`.

        Raises:
            RunStopped: always, which ends the work.
        """
        raise RunStopped(f"dropped after step {self.training.state.step}; {how_to_resume()}")

    def _go_on(self) -> None:
        assert self._work is not None
        try:
            reached = next(self._work)
        except StopIteration as end:
            self.result = end.value
            return
        if isinstance(reached, Run):
            self.run = reached
        else:
            self.loop = reached

    def _share_passes(self, loop: Loop) -> None:
        """Make the member of shared passes, if the run can share them."""
        try:
            member = Member(loop.model, self.random.generator)
            batch = next(iter(FirstBatches(loop.splits, loop.settings, loop.device)))
            with loop.accelerator.autocast():
                check_loss(loop.model, batch)
        except UnsupportedError as error:
            logger.warning("this run trains alone: %s", error)
            return
        # of the first batch of the data, whatever the step from which the run goes on
        self.member, self.tokens = member, tokens_of(batch)

    # The steps

    @property
    def training(self) -> Loop:
        """The loop, once its steps are to be made."""
        assert self.loop is not None
        return self.loop

    def autocast(self) -> AbstractContextManager[object]:
        return self.training.accelerator.autocast()

    def next_step(self) -> Sequence[tuple[Batch, float]]:
        return self.training.next_step(self.training.batches)

    def weigh(self, weight: float) -> None:
        self.training.lifecycle.aux_weight = weight

    def add(self, loss: Tensor, weight: float) -> None:
        self.training.add(loss, weight)
        self.training.timer.mark("passes")

    def backward(self, weighted: Sequence[tuple[Batch, float]]) -> None:
        self.training.backward(weighted)

    def update(self) -> None:
        self.training.update()

    def after_step(self, steps: int) -> bool:
        """Log and evaluate after a step of the group; return True if a checkpoint is due."""
        self.training.state.group_step = steps
        return self.training.after_step()


class RunGroup:
    """Runs whose adapters train in shared passes, some of them at a time.

    Between steps the caller may stop or drop runs; one that ends makes room for the next.

    Args:
        jobs: the runs, in the order in which they begin.
        together: how many train at a time, at most.

    Attributes:
        waiting: runs that have not begun.
        live: runs that train.
        steps: of the group.
    """

    def __init__(self, jobs: Sequence[RunJob], together: int) -> None:
        self.waiting = deque(job for job in jobs if job.error is None)
        self.live: list[RunJob] = []
        self.together, self.steps = together, 0
        self._driver, self._bases = Together(), Bases()

    def step(self, asked: Callable[[], int] = int) -> bool:
        """Begin runs that have room, and make a step of each; return False if none is left.

        Args:
            asked: returns the signal that asks the runs to stop after this step, or 0.
        """
        self._admit()
        self._driver.step(self.live)  # without any, tensors get memory of their own
        self.steps += 1
        signal = asked()  # which may have come during the step
        due = [bool(signal)]
        each(self.live, lambda job: due.append(job.after_step(self.steps)))
        over = [job for job in self.live if job.is_over or job.training.is_over]
        if any(due) or over:
            self._save()
        if signal:
            each(self.live, lambda job: job.training.stop(signal))
            self.waiting.clear()
        each(over, RunJob.finish)
        self.live = [job for job in self.live if not job.is_over]
        return bool(self.live or self.waiting)

    def stop(self, job: RunJob) -> None:
        """End a run as early stopping does: its best weights are scored and saved."""
        self._save()
        each([job], RunJob.finish)
        self.live.remove(job)

    def drop(self, job: RunJob) -> None:
        """End a run without a result; the same settings with train.resume=auto go on with it."""
        self._save()
        each([job], RunJob.leave)
        self.live.remove(job)

    def _save(self) -> None:
        """Write a checkpoint of each run, and delete old ones when all are there."""
        # the last to begin is the first, see `align`
        each(self.live[::-1], lambda job: job.training.save())
        each(self.live, lambda job: job.training.prune())

    def _admit(self) -> None:
        """Begin runs that wait, as long as there is room.

        Accelerate has one precision for a process, so runs of another one wait.
        """
        new: list[RunJob] = []
        while len(self.live) + len(new) < self.together:
            first = next(iter([*self.live, *new]), None)
            fitting = (j for j in self.waiting if first is None or j.precision == first.precision)
            job = next(fitting, None)
            if job is None:
                break
            self.waiting.remove(job)
            job.open(self._bases)
            if not job.is_over:
                new.append(job)
        if not self.live:
            self.steps = align(new)
        each(new, RunJob.prepare)
        self.live += [job for job in new if not job.is_over]


def train_runs(jobs: Sequence[RunJob], together: int) -> int:
    """Make runs, at most `together` at a time, whose adapters train in shared passes.

    SIGINT and SIGTERM end each of them after its step.

    Returns:
        The signal that ended them, or 0.
    """
    group = RunGroup(jobs, together)
    with StopRequest() as stop:
        while group.step(lambda: stop.signal):
            pass
    return stop.signal


def each(jobs: Sequence[RunJob], work: Callable[[RunJob], None]) -> None:
    """Do some work for each run that has not ended."""
    for job in jobs:
        if not job.is_over:
            with job.own():
                work(job)


def align(jobs: Sequence[RunJob]) -> int:
    """Let runs that are resumed go on from the same step of their group; return that step.

    They differ if the process was killed while it wrote checkpoints. Runs without a checkpoint set
    no bound: in a group, the last to begin is the first to write.
    """
    resumed = [job.run for job in jobs if job.run is not None and job.run.resume is not None]
    steps = [steps_of(run) for run in resumed]
    shared = set.intersection(*map(set, steps)) if steps else set()
    if not shared:
        return max((max(found, default=0) for found in steps), default=0)
    newest = max(shared)
    for run, found in zip(resumed, steps, strict=True):
        if run.resume != found[newest]:
            logger.info("%s goes on from %s, as the others", run.path, found[newest])
            run.resume = found[newest]
    return newest


def steps_of(run: Run) -> dict[int, Path]:
    """Return the complete checkpoints of a run by the step of its group."""
    found = {}
    for path in checkpoints(run.checkpoints):
        with suppress(InputError):  # a damaged one, of which the run has said so
            found[read_state(path)["progress"].get("group_step", 0)] = path
    return found
