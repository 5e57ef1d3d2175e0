"""The training loop: one for every method, one process or several.

The order within a step: forward and backward of each micro-batch, clipping, optimizer, the
method's `after_step`, gradients cleared. Each micro-batch is weighted by its fraction of the items
that the loss averages over (rows, or tokens with a label) on all processes, so any split of the
same rows gives the same gradient. No operation of a step synchronizes with the device.
"""

import logging
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from signal import SIGTERM, Signals
from typing import TypeVar

import torch
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file
from torch import Tensor

from petl.core.lifecycle import lifecycle
from petl.core.types import Record
from petl.data.tasks.base import Outputs, not_finite
from petl.errors import Diverged, InputError, RunStopped
from petl.system.collectives import Counts, on_main
from petl.system.files.disk import flush, stop_when_full
from petl.system.files.tensor_file import read_shapes
from petl.system.processes import StopRequest
from petl.system.progress import ProgressBar
from petl.system.settings.command_line import how_to_resume
from petl.training.dataloader import (
    Batch,
    FirstBatches,
    digest,
    load_on_cpu,
    to_device,
    without_labels,
)
from petl.training.distributed.launch import gathered, reshard
from petl.training.evaluate import for_training
from petl.training.features import Context
from petl.training.optimizer import (
    all_finite,
    fraction_of_peak,
    make_engine,
    make_optimizer,
    set_lr,
)
from petl.training.runs import checkpoint
from petl.training.runs.checkpoint import (
    LIFECYCLE,
    STATE,
    RngState,
    TrainState,
    load_adapter,
    prune,
    read_state,
    restore_optimizer,
    restore_rng,
    rng_state,
    step_folder,
    verify_best,
)
from petl.training.runs.records import METRICS
from petl.training.runs.resume import NOT_RESUMABLE, lengthens
from petl.training.runs.run_folder import Run
from petl.training.watch.findings import Findings
from petl.training.watch.model import inspect_optimizer
from petl.training.watch.steps import Steps
from petl.version import __version__

logger = logging.getLogger(__name__)
MOST_ROWS = 1000  # steps over which a log line averages at most; assumption


T = TypeVar("T")
# the work of a run: yields the run when its checkpoint is chosen, then its loop when the steps are
# to be made, and goes on when that is done
Stepwise = Generator["Run | Loop", None, T]


def fit(context: Context) -> Stepwise[TrainState]:
    """Train the adapter of a run, from the run's checkpoint if it has one.

    Yields a loop, whose steps are made by `alone`, or with those of others, see
    petl/training/together. With validation examples, the model ends with the weights of the best
    evaluation. With `train.steps=0` it stays as it is.

    Raises:
        InputError: a setting that this model does not support.
        RunStopped: a signal, a loss that is not finite, a full disk; the message says how to
            resume.
    """
    if context.settings.steps == 0:  # calibration has made the final adapter
        return TrainState()
    with for_training(context.model, context.settings):
        loop = Loop(context)
        with loop.begun():
            yield loop
        loop.restore_best()
        loop.engine.release()
        return loop.state


def alone(run: Stepwise[T]) -> T:
    """Make the steps of each loop that a run yields; return the run's result."""
    while True:
        try:
            reached = next(run)
        except StopIteration as end:
            return end.value
        try:
            if isinstance(reached, Loop):
                reached.run_to_end()
        except BaseException as error:
            run.throw(error)  # its blocks end by the error


class Loop:
    """A training loop: steps, log lines, evaluations and checkpoints."""

    def __init__(self, context: Context) -> None:
        model, splits, settings = context.model, context.splits, context.settings
        accelerator, run = context.accelerator, context.run
        self.context = context
        self.model, self.splits, self.settings = model, splits, settings
        self.accelerator, self.run, self.device = accelerator, run, accelerator.device
        self.lifecycle = lifecycle(model)
        self.total = splits.sampler(settings).steps
        # after the model is built: what ran before must not shift the random numbers of training
        set_seed(settings.seed, device_specific=True)  # dropout masks differ between processes
        if run.resume is None:
            # a checkpoint holds what `prepare` computed
            self.lifecycle.prepare(FirstBatches(splits, settings, self.device))
        reshard(model)  # `prepare` and scoring may have left parameters gathered
        self.optimizer = make_optimizer(model, settings, self.lifecycle)
        findings = Findings("warn")
        findings.speaks = accelerator.is_main_process
        inspect_optimizer(model, self.optimizer, findings)  # DeepSpeed puts its own tensors in it
        Steps(model, findings, looks=False)
        self.engine = make_engine(model, self.optimizer, settings.max_grad_norm, accelerator)
        self.rows = digest(splits.train)
        self.counts, self.timer = Counts(accelerator), run.timer
        self.log_steps = settings.log_interval(self.total)
        # a row for each of the last steps, read in one transfer
        self.window = torch.zeros(min(self.log_steps, MOST_ROWS), 3, device=self.device)
        # of the micro-batches of a step, on device
        self.losses: list[Tensor] = []
        self.extras: list[Tensor] = []
        self.unknown = 0  # steps before which a resumed run has no rows
        self.state = self.restore(run.resume) if run.resume else TrainState()
        self.warmup = settings.warmup_steps(self.total - self.state.schedule_from)
        # after restoring: the method may replace tensors of the optimizer
        self.lifecycle.attach_optimizer(self.optimizer, self.state.step, self.total)
        self.saved = run.resume  # the last checkpoint with finite weights
        if not self.lifecycle.can_resume:
            logger.warning("if this run is stopped, it cannot resume: %s", NOT_RESUMABLE)
        rank, processes = accelerator.process_index, accelerator.num_processes
        self.sampler = splits.sampler(settings, self.state.step, rank, processes)

    @contextmanager
    def begun(self) -> Generator[None]:
        """Inside the block, the steps are made: clocks run, and a bar shows how far they are."""
        settings, state = self.settings, self.state
        rows, collate, workers = self.splits.train, self.splits.collate, settings.num_workers
        self.batches = load_on_cpu(rows, collate, self.sampler, self.device, workers)
        self.timer.start()
        # a resumed run counts the seconds of its earlier parts as well
        self.began = time.monotonic() - state.seconds
        self.began_cpu = time.process_time() - state.cpu_seconds
        unit = self.splits.task.unit
        self.bar = ProgressBar(self.total, state.step, unit, self.log_steps)
        with self.bar:
            yield
        if state.step < self.total:
            logger.info(
                "early stopping after step %d of %d: no better validation %s in %d evaluations",
                state.step,
                self.total,
                self.splits.task.metric,
                state.stale,
            )

    def run_to_end(self) -> None:
        """Make the remaining steps, with what is due after each."""
        with StopRequest() as stop:
            while not self.is_over:
                self.step(self.batches)
                is_due = self.after_step()
                # all processes must agree, else some would wait for the others forever
                stopping = any(self.counts.total(stop.signal))  # in any process
                if is_due or stopping:
                    self.save()
                    self.prune()
                if stopping:
                    self.stop(stop.signal or SIGTERM)

    def after_step(self) -> bool:
        """Log and evaluate as is due after a step; return True if a checkpoint is due."""
        settings, state = self.settings, self.state
        state.seconds = time.monotonic() - self.began
        state.cpu_seconds = time.process_time() - self.began_cpu
        self.bar.advance()
        if self.is_due(self.log_steps):
            self.bar.show(self.log())
        self.timer.mark("logging")
        improved = self.is_due(settings.eval_steps) and self.evaluate()
        for feature in self.context.features:
            feature.after_step(self.context, state.step)
        self.timer.mark("evaluation")
        return improved or self.is_due(settings.save_steps)

    @property
    def is_over(self) -> bool:
        """True after the last step, or if early stopping ends the run."""
        return self.state.step >= self.total or self.is_stale()

    def is_due(self, every: int | None) -> bool:
        """Return True every `every` steps and after the last one; never for None."""
        return every is not None and (self.state.step % every == 0 or self.state.step == self.total)

    def is_stale(self) -> bool:
        """Return True if early stopping ends the run."""
        patience = self.settings.early_stopping
        return patience is not None and self.state.stale >= patience

    # One step

    def step(self, batches: Iterator[Batch]) -> None:
        """Run one optimizer step over the next rows of the sampler."""
        self.backward(self.next_step(batches))
        self.update()

    def next_step(self, batches: Iterator[Batch]) -> list[tuple[Batch, float]]:
        """Return the micro-batches of the next step, with their weights in its loss."""
        self.losses.clear()
        self.extras.clear()
        state, task = self.state, self.splits.task
        processes = self.accelerator.num_processes
        state.step += 1
        # spare micro-batches are computed for collective operations, with weight 0
        micro = [next(batches) for _ in range(self.sampler.num_micro_batches(state.step))]
        self.lifecycle.expect_micro_batches(len(micro))
        own = micro[: len(micro) - self.sampler.num_spare_micro_batches(state.step)]
        items = [task.items(batch) for batch in own] + [0] * (len(micro) - len(own))
        tokens = sum(task.count(batch) for batch in own)
        with self.accelerator.autocast():  # what an embedder computes apart depends on it
            positions = sum(task.positions(batch) for batch in micro)
        all_items, all_tokens, all_positions = self.counts.total(sum(items), tokens, positions)
        if all_items == 0:
            raise InputError(f"no row of step {state.step} has a label to learn from")
        state.tokens += all_tokens
        state.positions += all_positions
        self.timer.mark("data")
        # DDP and FSDP2 average gradients over processes, so the factor `processes` makes the sum of
        # weighted losses the mean over all items
        return [
            (batch, n * processes / all_items) if n else (without_labels(batch), 0.0)
            for batch, n in zip(micro, items, strict=True)
        ]

    def update(self) -> None:
        """Step the optimizer: the gradients of all micro-batches are there."""
        state = self.state
        set_lr(self.optimizer, self.lr_fraction(state.step))
        loss, aux = torch.stack(self.losses).sum(), torch.stack(self.extras).sum()
        self.record(loss, aux, self.engine.step())
        self.lifecycle.after_step(state.step, self.optimizer)
        self.optimizer.zero_grad()
        self.timer.mark("optimizer")

    def lr_fraction(self, step: int) -> float:
        """Return the fraction of its peak that each learning rate has at a step."""
        done, schedule = self.state.schedule_from, self.settings.schedule
        return fraction_of_peak(step - done, self.total - done, self.warmup, schedule)

    def backward(self, weighted: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
        """Add up the gradients of these micro-batches, of which the last one ends the step.

        Args:
            weighted: micro-batches with their weight in the loss of the step.
        """
        micro = self.splits.task.whole_step(weighted, self.forward)
        for i, (batch, weight) in enumerate(micro, start=1):
            with self.engine.passes(last=i == len(weighted)):
                self.lifecycle.aux_weight = weight
                with self.accelerator.autocast():
                    # weighted before backward, so that accumulated gradients are a mean
                    moved = to_device(batch, self.device)
                    inputs = self.splits.task.completed(self.model, moved)
                    loss = self.engine.wrapped(**inputs).loss * weight
                self.timer.mark("forward")
                self.engine.backward(loss)
                self.timer.mark("backward")
            self.add(loss, weight)

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Tensor]) -> Outputs:
        """The model's outputs for a micro-batch, in training mode and without a graph.

        Raises:
            InputError: the pass changes buffers, as the one with a graph would do again.
        """
        kept = {name: (own, own._version) for name, own in self.model.named_buffers()}
        with self.accelerator.autocast():
            outputs = self.engine.wrapped(**to_device(batch, self.device))
        changed = [name for name, (own, version) in kept.items() if own._version != version]
        if changed:
            raise InputError(
                f"train.micro_batch_size={self.settings.micro_batch_size} computes each row twice "
                f"in data.task={self.splits.task.name}, and each pass changes {changed[0]}, such "
                "as statistics of a batch: set train.micro_batch_size=null, or another method"
            )
        return outputs

    def add(self, loss: Tensor, weight: float) -> None:
        """Count the weighted loss of a micro-batch, and its auxiliary loss, on device."""
        loss = loss.detach()
        has_aux = self.lifecycle.has_aux
        aux = self.lifecycle.aux_loss() if has_aux else torch.zeros_like(loss)
        self.losses.append(loss)
        self.extras.append(aux * weight)

    def record(self, *values: Tensor) -> None:
        """Store loss, auxiliary loss and gradient norm of a step, on device."""
        # a ring buffer
        row = (self.state.step - 1) % len(self.window)
        self.window[row] = torch.stack(values)

    # Between steps

    def fetch(self) -> list[list[float]]:
        """Return the values of each step since the last log line, averaged over processes.

        Synchronizes with the device. Of more than `MOST_ROWS` steps, they are those of the last.

        Raises:
            RunStopped: one of them is not finite.
        """
        step = self.state.step
        since = step % self.log_steps or self.log_steps
        count = min(since, step - self.unknown, len(self.window))
        rows = self.accelerator.reduce(
            self.window[self.places(step - count, step)], reduction="mean"
        ).tolist()
        for number, (loss, _, norm) in enumerate(rows, start=step - count + 1):
            if not math.isfinite(loss + norm):
                raise self.diverged(
                    f"at step {number} the loss was {loss:g}, the gradient norm {norm:g}"
                )
        return rows

    def places(self, done: int, step: int) -> list[int]:
        """Return the rows of the window for the steps after `done`, up to `step`."""
        return [number % len(self.window) for number in range(done, step)]

    def diverged(self, event: str) -> Diverged:
        """Return the error for a loss or weights that are not finite."""
        last = (
            f"the last good checkpoint is {self.saved}"
            if self.saved
            else "no checkpoint was written before"
        )
        return Diverged(
            f"training diverged: {event}; {last}; try a lower train.lr or train.head_lr"
        )

    def log(self) -> Record:
        """Write a line of metrics: means since the last one; return it."""
        state, rows = self.state, self.fetch()
        state.spent = self.timer.totals()  # cheap here: `fetch` has just synchronized
        loss, aux, norm = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        is_first = state.step <= self.log_steps  # line of the log
        if is_first and norm == 0 and loss == 0:  # as of answers whose rewards are all equal
            logger.info("the loss has been 0 up to step %d: these rows taught nothing", state.step)
        elif is_first and norm == 0:
            logger.warning(
                "the gradient has been 0 up to step %d, so nothing is trained: does the loss "
                "depend on the layers that the method adapts?",
                state.step,
            )
        record = {
            **self.lifecycle.metrics(),
            **self.splits.task.metrics(),
            "step": state.step,
            "epoch": state.step / self.sampler.steps_per_epoch,
            "loss": loss - aux,  # of the task alone: comparable between methods
            "grad_norm": norm,
            "lr": self.settings.lr * self.lr_fraction(state.step),
            "tokens": state.tokens,
            "padding": state.padding,
            "seconds": state.seconds,
        }
        if self.lifecycle.has_aux:
            record["aux_loss"] = aux
        self.run.log.append(record)
        return record

    def evaluate(self) -> bool:
        """Score the validation examples; return True for the best evaluation so far.

        Raises:
            RunStopped: a score is not finite.
        """
        splits, state, task = self.splits, self.state, self.splits.task
        assert splits.validation is not None
        scores = self.context.evaluator.rows(splits.validation, tunes=True)
        broken = not_finite(scores)
        if broken:
            raise self.diverged(
                f"after step {state.step} the validation {broken} was {scores[broken]:g}"
            )
        features = self.context.features
        beyond = max((each.at_evaluation(self.context, state.step) for each in features), default=0)
        line = {"step": state.step, "validation": scores}
        self.run.log.append({**line, "excess": beyond} if beyond else line)
        self.bar.show_validation(task.metric, scores[task.metric])
        logger.info("step %d: validation %s %.4f", state.step, task.metric, scores[task.metric])
        return state.note(scores, task, beyond)

    def save(self) -> None:
        """Write a checkpoint, never of a state that is not finite."""
        state, run = self.state, self.run
        rows = self.fetch()
        state.window = rows if state.step % self.log_steps else []
        state.spent = self.timer.totals()
        # JSON and tensors of each process, for the main process to write
        rng = gather_object([rng_state(self.device)])
        target = step_folder(run.checkpoints, state.step)
        with self.engine.gathered():
            on_main(self.accelerator, lambda: self.write(target, rng))
        self.saved = target
        self.timer.mark("checkpoints")

    def prune(self) -> None:
        """Delete checkpoints that need not be kept."""
        keep, best, saved = self.settings.keep_checkpoints, self.state.best_step, self.saved
        if saved is not None:
            on_main(self.accelerator, lambda: prune(saved, keep, best))

    def write(self, target: Path, rng: list[RngState]) -> None:
        """Write a checkpoint of gathered values; called on the main process.

        Raises:
            RunStopped: a weight is not finite.
        """
        if not all_finite(self.model, self.optimizer):
            raise self.diverged(f"after step {self.state.step} a weight is not finite")
        state = {
            "identity": self.run.identity,
            "petl": __version__,
            "processes": self.accelerator.num_processes,
            "rows": self.rows,
            "progress": asdict(self.state),
        }
        log = self.run.path / METRICS
        with stop_when_full(self.run.path):
            flush(log)  # so that the log on disk reaches the step of the checkpoint
        with self.lifecycle.resumable():
            method_state = self.lifecycle.state_dict()
            checkpoint.write(target, self.model, self.optimizer, method_state, rng, state, log)

    def restore(self, source: Path) -> TrainState:
        """Restore everything from a checkpoint; return its state.

        Raises:
            InputError: the method cannot resume, or the training examples have changed.
        """
        if not self.lifecycle.can_resume:
            raise InputError(f"cannot resume from {source}: {NOT_RESUMABLE}")
        stored = read_state(source)
        if stored["rows"] != self.rows:
            raise InputError(
                f"cannot resume from {source}: the training examples have changed; "
                "leave out train.resume to start from step 0"
            )
        # adapter before optimizer, whose state is assigned by the names of its parameters
        with self.engine.gathered():
            load_adapter(self.model, source / "adapter")
            restore_optimizer(source, self.optimizer, self.model)
        read_shapes(source / LIFECYCLE)  # which says what is wrong with a damaged file
        self.lifecycle.load_state_dict(load_file(source / LIFECYCLE))
        if stored["processes"] == self.accelerator.num_processes:
            restore_rng(source, self.accelerator.process_index, self.device)
        else:
            logger.warning(
                "%s was written by %d processes and this run has %d: it sees the same examples, "
                "but dropout draws other masks",
                source,
                stored["processes"],
                self.accelerator.num_processes,
            )
        state = TrainState(**stored["progress"])
        if lengthens(stored["identity"], self.run.identity):
            self.lengthen(state, source)
        self.timer.spent = dict(state.spent)
        self.restore_window(state, source)
        self.run.log.rewind(source)
        return self.with_usable_best(state)

    def lengthen(self, state: TrainState, source: Path) -> None:
        """Prepare `state` for more steps than its run was to have; log with which schedule.

        Raises:
            InputError: there are no more steps, or early stopping would end the run at once.
        """
        settings, done = self.settings, state.step
        if self.total <= done:
            raise InputError(
                f"{source} has trained {done} steps already, and these settings make a run of "
                f"{self.total}: set a larger train.steps or train.epochs"
            )
        if settings.early_stopping is not None and state.stale >= settings.early_stopping:
            raise InputError(
                f"{source} is of a run that train.early_stopping={settings.early_stopping} ended: "
                "set a larger number, or null, to train it further"
            )
        if settings.resume_schedule == "fresh":
            state.schedule_from = done
            schedule = f"a fresh {settings.schedule} schedule for the {self.total - done} new steps"
        else:
            steps = self.total - state.schedule_from
            schedule = f"the {settings.schedule} schedule of one run of {steps} steps"
        logger.info("training further, from step %d to %d, with %s", done, self.total, schedule)

    def restore_window(self, state: TrainState, source: Path) -> None:
        """Restore the steps since the last log line, over which the next one averages as well.

        A log line may be due after another number of steps than in the stopped run: of steps that
        its checkpoint does not have, the first line has no part.

        Raises:
            InputError: they are not those of a training loop.
        """
        size, columns = self.window.shape
        if any(len(row) != columns for row in state.window) or len(state.window) > state.step:
            raise InputError(f"{source / STATE} cannot be used: its window is of another run")
        due = min(state.step % self.log_steps, size)
        rows = state.window[-due:] if due else []
        self.unknown = state.step - len(rows)
        # on the device, which a list of rows is not
        restored = torch.tensor(rows, device=self.device).view(-1, columns)
        self.window[self.places(self.unknown, state.step)] = restored

    def with_usable_best(self, state: TrainState) -> TrainState:
        """Return `state` with a best step whose checkpoint can be restored."""
        folder, log = self.run.checkpoints, self.run.path / METRICS
        return on_main(self.accelerator, lambda: verify_best(state, folder, log, self.splits.task))

    def restore_best(self) -> None:
        """Restore the adapter of the best evaluation, if there were any."""
        self.state = self.with_usable_best(self.state)
        best = self.state.best_step
        if best is not None and best != self.state.step:
            source = step_folder(self.run.checkpoints, best) / "adapter"
            with gathered(self.model):
                load_adapter(self.model, source)
            logger.info(
                "restored the best checkpoint: step %d (validation %s %.3f)",
                best,
                self.splits.task.metric,
                self.state.best,
            )

    def stop(self, signum: int) -> None:
        """End the run after a signal.

        Raises:
            RunStopped: always.
        """
        raise RunStopped(
            f"stopped by {Signals(signum).name} after step {self.state.step} of {self.total}; "
            f"{how_to_resume(self.saved)}",
            status=128 + signum,  # as shells report a signal
        )
