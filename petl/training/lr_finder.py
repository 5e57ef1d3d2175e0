"""A learning rate found by a range test: a short training whose rate rises at every step.

L. N. Smith 2017, arXiv:1506.01186, raises the rate evenly; here it rises by the same factor, from
`LOW` to `HIGH`. What is trained is a copy of the adapter on the model's own frozen weights, or in a
sharded model the adapter itself, which is put back: the run begins as if there had been no test.
The rates of other parameter groups (a head, LoRA+'s B)
rise in proportion.

The rule: the loss is smoothed over neighbouring steps; where it is lowest, training is about to
break, and a rate `MARGIN` times smaller is taken. With 5, the rates of lora, mos, sparse, adapter,
compacter and corda on the quickstart's task are within a factor of 1.3 of the best of three that
docs/results.md tried, that of mola a third of it.
"""

import copy
import logging
import math
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel

from petl.core.distributed import on_main
from petl.core.lifecycle import lifecycle
from petl.distributed.engine import is_sharded, whole
from petl.errors import RunStopped
from petl.files.disk import UNFINISHED, as_json, write_atomic
from petl.imports.extras import install_hint
from petl.runs.checkpoint import load_adapter, save_adapter
from petl.runs.environment import PhaseTimer
from petl.runs.run_folder import Run
from petl.runs.settings import TrainConfig
from petl.training.dataloader import Splits, load
from petl.training.loop import Loop
from petl.training.wrapping import for_training

LOW, HIGH = 1e-6, 1.0  # rates of the adapter
MARGIN = 5.0
BROKEN = 3.0  # times the least smoothed loss: higher, and the test ends
NOTE, POINTS, PICTURE = "find_lr", "lr_range.json", "lr_range.png"
logger = logging.getLogger(__name__)


def find_lr(
    model: PeftModel, splits: Splits, settings: TrainConfig, accelerator: Accelerator, run: Run
) -> TrainConfig:
    """The settings with the learning rates that a range test suggests.

    The outcome stands in scores.json; a run that is resumed takes it from there. Model, data order
    and random states are as if there had been no test.
    """
    if NOTE not in run.scores:
        run.laps.start()
        found = test_rates(model, splits, settings, accelerator, run)
        note = on_main(accelerator, lambda: conclude(found, settings, run.path))
        run.note({NOTE: note})
        run.laps.lap("range test")
    lr = run.scores[NOTE]["lr"]
    head_lr = None if settings.head_lr is None else settings.head_lr * lr / settings.lr
    run.settings = replace(settings, lr=lr, head_lr=head_lr)
    logger.info("learning rate %.3g: %s", lr, run.scores[NOTE]["rule"])
    return run.settings


@dataclass(frozen=True)
class RangeTest:
    """The loss of each step, before the step that was made at the rate beside it.

    Attributes:
        reach: how many steps on either side the loss is smoothed over.
    """

    rates: list[float]
    losses: list[float]
    reach: int = 4

    @property
    def smoothed(self) -> list[float]:
        return smooth(self.losses, self.reach)

    def suggestion(self) -> float | None:
        """The rate to train with; None if the loss fell at no rate."""
        losses = self.smoothed
        best = min(range(len(losses)), key=losses.__getitem__)
        return self.rates[best] / MARGIN if best else None


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Means over up to `reach` neighbours on either side, the near ones weighing more."""
    means = []
    for i in range(len(values)):
        did_you_mean = range(max(0, i - reach), min(len(values), i + reach + 1))
        weights = [reach + 1 - abs(i - j) for j in did_you_mean]
        pairs = zip(weights, did_you_mean, strict=True)
        means.append(sum(w * values[j] for w, j in pairs) / sum(weights))
    return means


def reach_of(steps: int) -> int:
    """A quarter of a power of ten: in a short test, more steps would blur the rates."""
    return max(1, steps // 25)


def rate_at(step: int, steps: int) -> float:
    """The adapter's rate at a step, from 1 to `steps`."""
    return LOW * (HIGH / LOW) ** ((step - 1) / (steps - 1))


# Making the test


def test_rates(
    model: PeftModel, splits: Splits, settings: TrainConfig, accelerator: Accelerator, run: Run
) -> RangeTest:
    """Train a copy of the adapter at rising rates."""
    each = replace(settings, log_steps=1)  # so that `fetch` is about one step
    if is_sharded(model):
        with put_back(model, accelerator, run), for_training(model, settings):
            return RisingLoop(model, splits, each, accelerator, run).run_while_it_learns()
    twin = with_shared_base(model)
    with for_training(twin, settings):
        found = RisingLoop(twin, splits, each, accelerator, run).run_while_it_learns()
    accelerator.free_memory()  # it knows of nothing but the twin yet
    return found


def with_shared_base(model: PeftModel) -> PeftModel:
    """A copy of a model in which all that trains is new and all that is frozen is the same."""
    frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


@contextmanager
def put_back(model: PeftModel, accelerator: Accelerator, run: Run) -> Generator[None]:
    """After it the adapter is as it was before: what lies in shares cannot be copied.

    It comes back from a file, as in a run that is resumed.
    """
    life, folder = lifecycle(model), run.checkpoints / f"{UNFINISHED}range-test"
    with whole(model), life.resumable():
        kept = {name: tensor.clone() for name, tensor in life.state_dict().items()}
        on_main(accelerator, lambda: save_adapter(model, folder))
    yield
    with whole(model):
        load_adapter(model, folder)
    life.load_state_dict(kept)
    accelerator.wait_for_everyone()
    on_main(accelerator, lambda: shutil.rmtree(folder))


class RisingLoop(Loop):
    """A training loop that writes nothing and whose rate rises."""

    def share(self, step: int) -> float:
        return rate_at(step, self.settings.find_lr_steps) / self.settings.lr

    def run_while_it_learns(self) -> RangeTest:
        """Steps until the loss is `BROKEN` or not finite; all processes see the same losses."""
        steps = self.settings.find_lr_steps
        logger.info("range test: %d steps at rates from %g to %g", steps, LOW, HIGH)
        self.plan, self.laps = replace(self.plan, steps=steps), PhaseTimer(self.device)
        self.laps.start()
        rows, collate, workers = self.splits.train, self.splits.collate, self.settings.num_workers
        batches = load(rows, collate, self.plan, self.device, workers)
        rates, losses, reach = [], [], reach_of(steps)
        for step in range(1, steps + 1):
            self.step(batches)
            try:
                ((loss, aux, _),) = self.fetch()
            except RunStopped:  # no longer finite
                break
            rates.append(rate_at(step, steps))
            losses.append(loss - aux)
            recent = smooth(losses, reach)
            if recent[-1] > BROKEN * min(recent):
                break
        return RangeTest(rates, losses, reach)


# What comes of it


def conclude(test: RangeTest, settings: TrainConfig, folder: Path) -> dict[str, Any]:
    """Write the test into the run's folder; the rate and how it was chosen, for scores.json."""
    lr = test.suggestion()
    if lr is None:
        lr, rule = settings.lr, "no rate of the range test lowered the loss, so train.lr stays"
        logger.warning(rule)
    else:
        rule = f"1/{MARGIN:g} of the rate at which the range test's smoothed loss was lowest"
    points = {"rates": test.rates, "losses": test.losses, "smoothed": test.smoothed}
    write_atomic(folder / POINTS, as_json(points))
    draw(test, lr, folder / PICTURE)
    return {"lr": lr, "rule": rule, "steps": len(test.rates)}


def draw(test: RangeTest, lr: float, path: Path) -> list[Path]:
    """Draw the loss against the rate, and the rate that is taken; the files written.

    Without matplotlib, which is optional, a warning says how to get it and nothing is drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s is not drawn: %s", path.name, install_hint("plots"))
        return []
    figure = Figure(figsize=(6.5, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, ".", color="0.6", markersize=4, label="each step")
    axes.plot(test.rates, test.smoothed, color="#0b559f", label="smoothed")
    axes.axvline(lr, color="#c55a11", linestyle="--", label=f"taken: {lr:.2g}")
    axes.set_xscale("log")
    highest = max(loss for loss in test.smoothed if math.isfinite(loss))
    lowest = min(test.losses)
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.1 * (highest - lowest))
    axes.set_xlabel("learning rate of the adapter")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    return [path]
