"""Learning rate range test: a short training whose learning rate rises at every step.

L. N. Smith 2017, arXiv:1506.01186, raises the learning rate linearly; here it rises by a constant
factor, from `LOW` to `HIGH`. The test trains a copy of the adapter on the model's own frozen
weights, or the adapter itself if the model is sharded, which is restored afterwards: the run begins
as if there had been no test. The learning rates of other parameter groups (a head, lora_B with
LoRA+) rise in proportion.

The rule: the loss is smoothed over neighboring steps; where it is lowest, training is about to
diverge, and a learning rate `MARGIN` times lower is chosen.
"""

import copy
import logging
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from accelerate import Accelerator
from peft import PeftModel

from petl.core.lifecycle import lifecycle
from petl.core.model.heat_map import save_figure
from petl.core.support import Capability
from petl.core.types import Record
from petl.errors import Diverged, InputError
from petl.system.collectives import is_sharded, on_main
from petl.system.files.disk import UNFINISHED, as_json, remove, stop_when_full, write_atomic
from petl.system.files.read import read_json
from petl.system.progress import ProgressItems
from petl.system.values import type_problem
from petl.training.dataloader import load_on_cpu
from petl.training.distributed.launch import gathered
from petl.training.evaluate import for_training
from petl.training.features import Context, RunFeature
from petl.training.features.section import Section
from petl.training.loop import Loop
from petl.training.runs.checkpoint import load_adapter, save_adapter
from petl.training.runs.environment import PhaseTimer
from petl.training.runs.records import SCORES
from petl.training.runs.run_folder import Run
from petl.training.runs.settings import TrainConfig

LOW, HIGH = 1e-6, 1.0  # learning rates of the adapter; assumption: the range of all methods
# Measured on the quickstart's task: with 5, the learning rates of lora, mos, sparse, adapter,
# compacter and corda are within a factor of 1.3 of the best of three in docs/results.md, that of
# mola a third of it.
MARGIN = 5.0
BROKEN = 3.0  # assumption: above this multiple of the lowest smoothed loss, the test ends
POINTS, PICTURE = "lr_range.json", "lr_range.png"
logger = logging.getLogger(__name__)


class FoundRate(TypedDict):
    """The learning rate that was found, and how."""

    lr: float
    rule: str


class LrFinder(RunFeature):
    """Trains with the learning rates that a range test suggests.

    The result is in scores.json, from which a resumed run reads it. Model, data order and random
    states are as if there had been no test.
    """

    key = "find_lr"
    uses = (Capability.FIND_LR,)

    def before_training(self, context: Context) -> None:
        """Run the test, and set the learning rates of the training."""
        run, settings = context.run, context.settings
        if self.key not in run.scores:
            test = run_test(context) if run.resume is None else earlier_test(settings, run.path)
            with stop_when_full(run.path):
                note = on_main(run.accelerator, lambda: conclude(test, settings, run.path))
            context.add({self.key: note}, "range test")
        found = run.scores[self.key]
        lr = found["lr"]
        head_lr = None if settings.head_lr is None else settings.head_lr * lr / settings.lr
        logger.info("learning rate %.3g: %s", lr, found["rule"])
        context.settings = replace(settings, lr=lr, head_lr=head_lr)

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return the picture of the test, and the learning rate that was chosen."""
        found = scores.get(cls.key)
        if found is None:
            return None
        problem = type_problem(found, FoundRate)
        if problem:
            raise InputError(f"{folder / SCORES} cannot be used: {cls.key}: {problem}")
        pictures = [PICTURE] if (folder / PICTURE).is_file() else []
        text = f"Peak learning rate {found['lr']:.3g}: {found['rule']}."
        return Section("Learning rate range test", text, pictures=pictures)


@dataclass(frozen=True)
class RangeTest:
    """Learning rate and loss of each step; the loss is that before the step.

    Attributes:
        reach: the number of steps on either side that the loss is smoothed over.
    """

    rates: list[float]
    losses: list[float]
    reach: int = 4

    @property
    def smoothed(self) -> list[float]:
        """The smoothed loss of each step."""
        return smooth(self.losses, self.reach)

    def suggestion(self) -> float | None:
        """Return the learning rate to train with; None if the loss never fell."""
        losses = self.smoothed
        best = min(range(len(losses)), key=losses.__getitem__)
        return self.rates[best] / MARGIN if best else None


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Return means over up to `reach` neighbors on either side, with triangular weights."""
    means = []
    for i in range(len(values)):
        window = range(max(0, i - reach), min(len(values), i + reach + 1))
        weights = [reach + 1 - abs(i - j) for j in window]
        pairs = zip(weights, window, strict=True)
        means.append(sum(w * values[j] for w, j in pairs) / sum(weights))
    return means


def reach_of(steps: int) -> int:
    """Return the smoothing reach for a test: steps in which the learning rate grows by 10^(1/4).

    In a short test a longer reach would blur the learning rates.
    """
    return max(1, steps // 25)


def lr_at(step: int, steps: int) -> float:
    """Return the adapter's learning rate at a step, from 1 to `steps`."""
    return LOW * (HIGH / LOW) ** ((step - 1) / (steps - 1))


def earlier_test(settings: TrainConfig, run: Path) -> RangeTest:
    """Return the range test of a run whose scores were lost; a checkpoint is no place for one."""
    file = run / POINTS
    points = read_json(file, dict[str, list[float]]) if file.exists() else {}
    if not {"rates", "losses"} <= points.keys():
        raise InputError(
            f"train.find_lr=true: the learning rate that {run} found is lost with {SCORES} and "
            f"{file.name}; begin the run again in another folder"
        )
    return RangeTest(points["rates"], points["losses"], reach_of(settings.find_lr_steps))


# Running the test


def run_test(context: Context) -> RangeTest:
    """Train a copy of the adapter at rising learning rates."""
    model, settings, accelerator = context.model, context.settings, context.accelerator
    # one log line a step, so that `fetch` returns one; the run's scores are untouched
    own = replace(context, settings=replace(settings, log_steps=1), splits=context.splits.mixed)
    if is_sharded(model):
        with restored(model, accelerator, context.run), for_training(model, settings):
            return RisingLoop(own).run_while_it_learns()
    own.model = with_shared_base(model)
    with for_training(own.model, settings):
        test = RisingLoop(own).run_while_it_learns()
    accelerator.free_memory()  # it holds nothing but the copy at this point
    return test


def with_shared_base(model: PeftModel) -> PeftModel:
    """Return a copy of a model that shares its frozen parameters."""
    # the memo of deepcopy: objects in it are not copied
    frozen: dict[int, object] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


@contextmanager
def restored(model: PeftModel, accelerator: Accelerator, run: Run) -> Generator[None]:
    """Restore the adapter at the end of the block, because a sharded model cannot be copied.

    It is saved to a file and loaded again, as in a run that is resumed.
    """
    life, folder = lifecycle(model), run.checkpoints / f"{UNFINISHED}range-test"
    with gathered(model), life.resumable():
        state = {name: tensor.clone() for name, tensor in life.state_dict().items()}
        on_main(accelerator, lambda: save_adapter(model, folder))
    yield
    with gathered(model):
        load_adapter(model, folder)
    life.load_state_dict(state)
    accelerator.wait_for_everyone()
    on_main(accelerator, lambda: remove(folder))


class RisingLoop(Loop):
    """A training loop with a rising learning rate, which writes nothing."""

    def lr_fraction(self, step: int) -> float:
        return lr_at(step, self.settings.find_lr_steps) / self.settings.lr

    def run_while_it_learns(self) -> RangeTest:
        """Train until the loss is `BROKEN` or not finite; all processes see the same losses."""
        steps = self.settings.find_lr_steps
        self.sampler, self.timer = replace(self.sampler, steps=steps), PhaseTimer(self.device)
        self.timer.start()
        rows, collate, workers = self.splits.train, self.splits.collate, self.settings.num_workers
        batches = load_on_cpu(rows, collate, self.sampler, self.device, workers)
        rates, losses, reach = [], [], reach_of(steps)
        what = f"range test, learning rates from {LOW:g} to {HIGH:g}"
        for step in ProgressItems(range(1, steps + 1), what, unit="steps"):
            self.step(batches)
            try:
                ((loss, aux, _),) = self.fetch()
            except Diverged:
                if not losses:  # at the lowest learning rate, so no other would help
                    raise
                break
            # the loss of a step is that before its update
            rates.append(lr_at(step, steps))
            losses.append(loss - aux)
            recent = smooth(losses, reach)
            if recent[-1] > BROKEN * min(recent):
                break
        return RangeTest(rates, losses, reach)


# The result


def conclude(test: RangeTest, settings: TrainConfig, folder: Path) -> Record:
    """Write the test to the run's folder; return the chosen learning rate, for scores.json."""
    lr = test.suggestion()
    if lr is None:
        lr = settings.lr
        rule = f"no learning rate of the range test lowered the loss, so train.lr={lr:g} stays"
        logger.warning(rule)
    else:
        rule = f"1/{MARGIN:g} of the learning rate with the lowest smoothed loss in the range test"
    points = {"rates": test.rates, "losses": test.losses, "smoothed": test.smoothed}
    write_atomic(folder / POINTS, as_json(points))
    draw(test, lr, folder / PICTURE)
    return {"lr": lr, "rule": rule, "steps": len(test.rates)}


def draw(test: RangeTest, lr: float, path: Path) -> list[Path]:
    """Plot the loss against the learning rate, mark the chosen one; return the files written."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(6.5, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    smoothed = test.smoothed
    axes.plot(test.rates, test.losses, ".", color="0.6", markersize=4, label="each step")
    axes.plot(test.rates, smoothed, color="#0b559f", label=f"smoothed over ± {test.reach} steps")
    axes.axvline(lr, color="#c55a11", linestyle="--", label=f"chosen: {lr:.2g}")
    axes.set_xscale("log")
    low, high = limits_of(test.losses, smoothed)
    axes.set_ylim(low, high)
    cut = [rate for rate, loss in zip(test.rates, test.losses, strict=True) if not loss <= high]
    # at the edge, so that it is seen that the loss goes on rising
    name = "above" if cut else "_"  # no entry of the legend without such steps
    axes.plot(cut, [high] * len(cut), "^", color="#c55a11", clip_on=False, label=name)
    axes.set_title("Learning rate range test", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("learning rate of the adapter")
    axes.set_ylabel("training loss before the step")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
    return [path]


def limits_of(losses: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """Return the range of losses to show: that of the steps up to the divergence.

    The loss rises by orders of magnitude when it diverges, which would make a flat line of the
    rest. It is cut at as much above the start as the valley is below it.
    """
    start, lowest = smoothed[0], min(loss for loss in smoothed if math.isfinite(loss))
    least = min(loss for loss in losses if math.isfinite(loss))
    before = losses[: smoothed.index(lowest) + 1]
    most = max([loss for loss in before if math.isfinite(loss)] + [2 * start - lowest])
    margin = 0.05 * max(most - least, 1e-6)
    return least - margin, most + margin
