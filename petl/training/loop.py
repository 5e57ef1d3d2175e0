"""The training loop: one for every method, one process or several.

In a step, in this order: forward and backward of each micro-batch, clipping, optimizer, the
method's `after_step`, gradients cleared. Each micro-batch counts by its share of the items that
the loss averages over (rows, or tokens with a label), over all processes, so that any split of the
same rows gives the same gradient. Nothing in a step waits for the device.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from petl.config.command_line import to_go_on
from petl.core.distributed import Counts, on_main
from petl.core.lifecycle import lifecycle
from petl.distributed.engine import reshard, whole
from petl.distributed.processes import StopRequest
from petl.errors import InputError, RunStopped
from petl.files.disk import flush
from petl.runs import checkpoint
from petl.runs.checkpoint import (
    LIFECYCLE,
    METRICS,
    RngState,
    load_adapter,
    prune,
    restore_optimizer,
    restore_rng,
    rng_state,
    step_folder,
    verify,
)
from petl.runs.resume import NOT_RESUMABLE, is_resumable
from petl.runs.run_folder import Run
from petl.runs.settings import TrainConfig
from petl.runs.state import TrainState, settle_best
from petl.training.dataloader import (
    Batch,
    FirstBatches,
    Splits,
    digest,
    load,
    to_device,
    without_labels,
)
from petl.training.evaluate import evaluate
from petl.training.optimizer import (
    all_finite,
    make_engine,
    make_optimizer,
    set_rates,
    share_of_peak,
)
from petl.training.progress_bar import ProgressBar
from petl.training.wrapping import for_training
from petl.version import __version__

logger = logging.getLogger(__name__)


def fit(
    model: PeftModel, splits: Splits, settings: TrainConfig, accelerator: Accelerator, run: Run
) -> TrainState:
    """Train the adapter in `model`, from the run's checkpoint if it has one.

    With evaluation on held-out rows the model ends as it was at the best of them.

    Raises:
        InputError: a setting that this model cannot follow.
        RunStopped: a signal, a loss that is not finite, a full disk; the message says how to go on.
    """
    with for_training(model, settings), run.tracked():
        return Loop(model, splits, settings, accelerator, run).run_to_end()


class Loop:
    """The state of a training loop and the things that may happen in it."""

    def __init__(
        self,
        model: PeftModel,
        splits: Splits,
        settings: TrainConfig,
        accelerator: Accelerator,
        run: Run,
    ) -> None:
        self.model, self.splits, self.settings = model, splits, settings
        self.accelerator, self.run, self.device = accelerator, run, accelerator.device
        self.life = lifecycle(model)
        self.total = splits.plan(settings).steps
        self.warmup = settings.warmup_steps(self.total)
        set_seed(settings.seed, device_specific=True)  # each process drops out other values
        if run.resume is None:
            self.life.prepare(FirstBatches(splits, settings, self.device))
        reshard(model)
        self.optimizer = make_optimizer(model, settings, self.life)
        self.engine = make_engine(model, self.optimizer, settings.max_grad_norm, accelerator)
        self.rows = digest(splits.train)
        self.counts, self.laps = Counts(accelerator), run.laps
        self.window = torch.zeros(settings.log_steps, 3, device=self.device)
        self.progress = self.restore(run.resume) if run.resume else TrainState()
        self.life.attach_optimizer(self.optimizer, self.progress.step, self.total)
        self.saved = run.resume  # the last checkpoint known to be good
        if not is_resumable(self.life):
            logger.warning("if this run is stopped it has to start anew: %s", NOT_RESUMABLE)
        place = accelerator.process_index, accelerator.num_processes
        self.plan = splits.plan(settings, self.progress.step, *place)

    def run_to_end(self) -> TrainState:
        """Every step that is left, and what is due after it."""
        settings, progress = self.settings, self.progress
        rows, collate, workers = self.splits.train, self.splits.collate, settings.num_workers
        batches = load(rows, collate, self.plan, self.device, workers)
        self.laps.start()
        began = time.monotonic() - progress.seconds
        began_cpu = time.process_time() - progress.cpu_seconds
        unit = self.splits.task.unit
        display = ProgressBar(self.accelerator, self.total, progress.step, unit)
        with StopRequest() as stop, display:
            while progress.step < self.total and not self.is_stale():
                self.step(batches)
                progress.seconds = time.monotonic() - began
                progress.cpu_seconds = time.process_time() - began_cpu
                display.advance()
                if self.is_due(settings.log_steps):
                    display.show(self.log())
                self.laps.lap("logging")
                better = self.is_due(settings.eval_steps) and self.evaluate()
                self.laps.lap("evaluation")
                asked = any(self.counts.total(stop.signal))  # of any process
                if better or asked or self.is_due(settings.save_steps):
                    self.save()
                self.laps.lap("checkpoints")
                if asked:
                    self.stop(stop.signal or SIGTERM)
        self.restore_best()
        self.engine.release()
        return self.progress

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and after the last one, is due."""
        return every is not None and (
            self.progress.step % every == 0 or self.progress.step == self.total
        )

    def is_stale(self) -> bool:
        patience = self.settings.early_stopping
        return patience is not None and self.progress.stale >= patience

    # One step

    def step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over the next rows of the plan."""
        progress, task = self.progress, self.splits.task
        processes = self.accelerator.num_processes
        progress.step += 1
        micro = [next(batches) for _ in range(self.plan.num_micro_batches(progress.step))]
        own = micro[: len(micro) - self.plan.num_spare_micro_batches(progress.step)]
        items = [task.items(batch) for batch in own] + [0] * (len(micro) - len(own))
        tokens = sum(task.count(batch) for batch in own)
        positions = sum(task.positions(batch) for batch in micro)
        all_items, all_tokens, all_positions = self.counts.total(sum(items), tokens, positions)
        if all_items == 0:
            raise InputError(f"no row of step {progress.step} has a label to learn from")
        progress.tokens += all_tokens
        progress.positions += all_positions
        self.laps.lap("data")
        # the mean over processes of what each adds up is then the mean over all items
        shares = [
            (batch, n * processes / all_items) if n else (without_labels(batch), 0.0)
            for batch, n in zip(micro, items, strict=True)
        ]
        losses = self.backward(shares)
        set_rates(self.optimizer, self.share(progress.step))
        self.record(*losses, self.engine.step())
        self.life.after_step(progress.step, self.optimizer)
        self.optimizer.zero_grad()
        self.laps.lap("optimizer")

    def share(self, step: int) -> float:
        """What share of its peak each rate has at a step."""
        return share_of_peak(step, self.total, self.warmup, self.settings.schedule)

    def backward(self, shares: list[tuple[Batch, float]]) -> tuple[Tensor, Tensor]:
        """Add up the gradients of all micro-batches; their loss and auxiliary loss, on device."""
        losses, extras = [], []
        for i, (batch, share) in enumerate(shares, start=1):
            with self.engine.passes(last=i == len(shares)):
                self.life.aux_weight = share
                with self.accelerator.autocast():
                    loss = self.engine.wrapped(**to_device(batch, self.device)).loss * share
                self.laps.lap("forward")
                self.engine.backward(loss)
                self.laps.lap("backward")
            losses.append(loss.detach())
            aux = self.life.aux_loss() if self.life.has_aux else torch.zeros_like(losses[-1])
            extras.append(aux * share)
        return torch.stack(losses).sum(), torch.stack(extras).sum()

    def record(self, *figures: Tensor) -> None:
        row = (self.progress.step - 1) % len(self.window)
        self.window[row] = torch.stack(figures)

    # Between steps

    def fetch(self) -> list[list[float]]:
        """The figures of each step since the last log line, mean over processes; waits for them.

        Raises:
            RunStopped: one of them is not finite.
        """
        step = self.progress.step
        count = step % len(self.window) or len(self.window)
        rows = self.accelerator.reduce(self.window[:count], reduction="mean").tolist()
        for number, (loss, _, norm) in enumerate(rows, start=step - count + 1):
            if not math.isfinite(loss + norm):
                raise self.diverged(
                    f"at step {number} the loss was {loss:g}, its gradient {norm:g}"
                )
        return rows

    def diverged(self, what: str) -> RunStopped:
        kept = (
            f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint was due"
        )
        return RunStopped(f"training diverged: {what}; {kept}; try a smaller train.lr or head_lr")

    def log(self) -> dict[str, Any]:
        """Write a line of metrics: means since the last one."""
        progress, rows = self.progress, self.fetch()
        progress.spent = self.laps.settle()  # the device has just been waited for
        loss, aux, norm = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        record = {
            **self.life.metrics(),
            "step": progress.step,
            "epoch": progress.step / self.plan.steps_per_epoch,
            "loss": loss - aux,
            "grad_norm": norm,
            "lr": self.settings.lr * self.share(progress.step),
            "tokens": progress.tokens,
            "padding": progress.padding,
            "seconds": progress.seconds,
        }
        if self.life.has_aux:
            record["aux_loss"] = aux
        self.run.log(record)
        return record

    def evaluate(self) -> bool:
        """Score the held-out rows; whether it is the best score so far."""
        splits, progress, task = self.splits, self.progress, self.splits.task
        assert splits.validation is not None
        size = self.settings.eval_batch_size
        scores = evaluate(self.model, splits, splits.validation, self.accelerator, size)
        self.run.log({"step": progress.step, "validation": scores})
        score, best = scores[task.metric], progress.best
        logger.info("step %d: validation %s %.4f", progress.step, task.metric, score)
        if best is None or (score > best if task.higher_is_better else score < best):
            progress.best, progress.best_step, progress.stale = score, progress.step, 0
            return True
        progress.stale += 1
        return False

    def save(self) -> None:
        """Write a checkpoint, never of a state that is not finite; drop those no longer kept."""
        progress, run = self.progress, self.run
        rows = self.fetch()
        progress.window = rows if progress.step % len(self.window) else []
        progress.spent = self.laps.settle()
        rng = gather_object([rng_state(self.device)])
        target = step_folder(run.checkpoints, progress.step)
        with self.engine.whole():
            on_main(self.accelerator, lambda: self.write(target, rng))
        self.saved = target

    def write(self, target: Path, rng: list[RngState]) -> None:
        if not all_finite(self.model, self.optimizer):
            raise self.diverged(f"after step {self.progress.step} a weight is not finite")
        state = {
            "identity": self.run.identity,
            "petl": __version__,
            "processes": self.accelerator.num_processes,
            "rows": self.rows,
            "progress": asdict(self.progress),
        }
        log = self.run.path / METRICS
        flush(log)  # its lines are those up to the checkpoint
        with self.life.resumable():
            kept = self.life.state_dict()
            checkpoint.write(target, self.model, self.optimizer, kept, rng, state, log)
        prune(target, self.settings.keep_checkpoints, self.progress.best_step)

    def restore(self, source: Path) -> TrainState:
        """Take back everything from a checkpoint, and come back to its step."""
        if not is_resumable(self.life):
            raise InputError(f"{source} cannot be gone on from: {NOT_RESUMABLE}")
        state = verify(source)
        if state["rows"] != self.rows:
            raise InputError(f"the train rows are not those of {source}; leave out train.resume")
        with self.engine.whole():
            load_adapter(self.model, source / "adapter")
            restore_optimizer(source, self.optimizer, self.model)
        self.life.load_state_dict(load_file(source / LIFECYCLE))
        if state["processes"] == self.accelerator.num_processes:
            restore_rng(source, self.accelerator.process_index, self.device)
        else:
            logger.warning(
                "%s was written by %d processes and this run has %d: the rows are the same, "
                "but dropout draws other masks",
                source,
                state["processes"],
                self.accelerator.num_processes,
            )
        progress = TrainState(**state["progress"])
        self.laps.spent = dict(progress.spent)
        rows = torch.tensor(progress.window).view(-1, self.window.shape[1])
        self.window[: len(rows)] = rows
        self.run.rewind(source, progress.step)
        return self.settled(progress)

    def settled(self, progress: TrainState) -> TrainState:
        """`progress` with a best step that can be gone back to."""
        folder, log = self.run.checkpoints, self.run.path / METRICS
        return on_main(
            self.accelerator, lambda: settle_best(progress, folder, log, self.splits.task)
        )

    def restore_best(self) -> None:
        """Go back to the best evaluation, if there were any."""
        self.progress = self.settled(self.progress)
        best = self.progress.best_step
        if best is not None and best != self.progress.step:
            source = step_folder(self.run.checkpoints, best) / "adapter"
            with whole(self.model):
                load_adapter(self.model, source)
            logger.info("the adapter is that of step %d, the best on the held-out rows", best)

    def stop(self, signum: int) -> None:
        raise RunStopped(
            f"stopped by {Signals(signum).name} after step {self.progress.step} of {self.total}; "
            f"{to_go_on(self.saved)}",
            status=128 + signum,
        )
