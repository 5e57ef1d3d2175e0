"""A run over a stream of classes (data.order=by_class), all of which are scored after each stage.

The file stages.json in the folder of the run has the accuracy by class after each stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from petl.core.model.heat_map import HeatMap, draw
from petl.core.support import Capability
from petl.core.types import Record
from petl.data.base import BY_CLASS, Stream, stream_refused
from petl.data.class_stream import ClassStream
from petl.data.tasks.classification import SingleLabelTask
from petl.errors import InputError
from petl.system.collectives import on_main
from petl.system.files.disk import as_json, stop_when_full, write_atomic
from petl.system.files.read import read_json
from petl.system.values import LARGEST
from petl.training.dataloader import TrainingRows, longest_first
from petl.training.evaluate import ScoredPart
from petl.training.features import Context, RunFeature
from petl.training.features.section import Section
from petl.training.runs.config import RunConfig
from petl.training.runs.settings import TrainConfig

STAGES = "stages.json"
PICTURE = "class_stream.png"


class ClassOrder(RunFeature):
    """Trains on the rows of one class after the other, and scores all classes after each."""

    key = "stream"
    charts = (
        ("stage_accuracy", "Accuracy after each stage", "accuracy on all classes (from 0 to 1)"),
    )
    lacks = {
        Capability.BUCKETS: "it orders rows by class, and buckets by length",
        Capability.EVALUATION: (
            "the best checkpoint would hide what was forgotten; its stages are scored on the test "
            "rows"
        ),
        Capability.TASKS: "it is for rows of one task",
    }

    def check(self, config: RunConfig) -> None:
        """Raise InputError for settings that do not suit a stream of classes."""
        train = config.train
        if train.epochs not in (TrainConfig.epochs, 1):
            raise InputError(
                f"train.epochs={train.epochs:g} has no effect with data.order={BY_CLASS}, which is "
                "passed once: set data.stream_repeats, the passes over the rows of each class"
            )

    def order(self, rows: TrainingRows) -> TrainingRows:
        """Return the rows class by class.

        Raises:
            InputError: the rows have no class each, or the stream has too few steps.
        """
        given = f"data.order={BY_CLASS}"
        if isinstance(rows.train, Stream):
            raise stream_refused(given)
        if not isinstance(rows.task, SingleLabelTask):
            raise InputError(
                f"{given} needs rows with one class each, and data.task={rows.task.name} has none: "
                "leave data.order null"
            )
        repeats = self.groups["data"].get("stream_repeats") or 1
        labels = np.asarray(rows.train["labels"], dtype=int)
        stream = ClassStream(labels, rows.settings.batch_size, repeats)
        steps, length = rows.settings.steps, len(stream.sizes)
        if steps is not None and steps > length:
            raise InputError(
                f"train.steps={steps}, but {given} has {length} steps: set fewer, or a larger "
                "data.stream_repeats"
            )
        return rows._replace(order=stream)

    @torch.no_grad()
    def after_step(self, context: Context, step: int) -> None:
        """Score the test rows of all classes if a stage ends, and add that to stages.json."""
        stream, run, splits = context.splits.order, context.run, context.splits
        assert isinstance(stream, ClassStream)
        if step not in stream.ends:
            return
        number = list(stream.ends).index(step) + 1
        what = f"scoring all classes after stage {number} of {len(stream.ends)}"
        part = ScoredPart(splits.test, longest_first(splits.task.lengths(splits.test)))
        total = context.evaluator.one_pass(part, None, what)
        stage = stage_of(total, splits.task.labels or [], step, stream.ends[step])

        def write() -> None:
            # a run that was stopped after this stage, and resumed before it, has it already
            earlier = read_stages(run.path, step - 1)
            with stop_when_full(run.path):
                write_stages(run.path, [*earlier, stage])

        on_main(run.accelerator, write)
        context.log({"step": step, "stage_accuracy": stage["accuracy"]})

    def after_training(self, context: Context, step: int) -> Mapping[str, object]:
        """Draw the stages; return their average accuracy and what was forgotten."""
        run = context.run

        def finish() -> list[Stage]:
            stages = read_stages(run.path, step)
            if stages:
                draw(numbered(accuracy_map(stages)), run.path / PICTURE)
            return stages

        stages = on_main(run.accelerator, finish)
        # none if train.steps ends the run within the first
        return {self.key: stream_scores(stages)} if stages else {}

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return the accuracies of the stages so far; None before the first has ended."""
        stages = read_stages(folder)
        if not stages:
            return None
        found = stream_scores(stages)
        average, lost = 100 * found["average_accuracy"], 100 * found["forgetting"]
        return Section(
            "Classes one after the other",
            f"The training rows came class by class, in {len(stages)} stages so far; after each, "
            "all classes were scored. Average accuracy, the mean over classes after the last "
            f"stage: {average:.1f} %. Forgetting, the mean over classes of the best accuracy after "
            f"any stage minus the last one: {lost:.1f} points.",
            heat_maps=[accuracy_map(stages)],
            line=f"classes one after the other: average accuracy {average:.1f} %, forgetting "
            f"{lost:.1f} points after {len(stages)} stages",
            drawn=[PICTURE],
        )


class Stage(TypedDict):
    """The scores after a stage.

    `step` is its last step, `trained` the class of its rows. `accuracy` is that of all test rows
    together, `by_class` that of the rows of each class, null for a class without test rows.
    """

    step: int
    trained: str
    accuracy: float
    by_class: dict[str, float | None]


def read_stages(run: Path, up_to: int = LARGEST) -> list[Stage]:
    """Read stages.json of a run's folder, up to a step; empty without the file.

    Raises:
        InputError: it cannot be read, or has numbers or classes that no run writes.
    """
    file = run / STAGES
    if not file.exists():
        return []
    stages: list[Stage] = read_json(file, list[Stage])
    for i, stage in enumerate(stages):
        known = [v for v in (stage["accuracy"], *stage["by_class"].values()) if v is not None]
        wrong = [v for v in known if not 0 <= v <= 1]
        ordered = stage["step"] > (stages[i - 1]["step"] if i else 0)
        same = stage["by_class"].keys() == stages[0]["by_class"].keys()
        if wrong or not ordered or not same or len(known) < 2:
            raise InputError(
                f"{file} cannot be used: [{i}] is no stage of a run, with rising steps, the same "
                "classes as the others, and accuracies from 0 to 1"
            )
    return [stage for stage in stages if stage["step"] <= up_to]


def write_stages(run: Path, stages: Sequence[Stage]) -> None:
    """Write stages.json into a run's folder."""
    write_atomic(run / STAGES, as_json(list(stages), in_order=True))


def stream_scores(stages: Sequence[Stage]) -> dict[str, float]:
    """Return average accuracy and forgetting after the last stage, and the number of stages.

    Average accuracy is the mean over classes of their last accuracy; forgetting is the mean over
    classes of their best accuracy after any stage minus the last one (Chaudhry et al. 2018,
    arXiv:1801.10112, with the last stage among those for the best, so that it is at least 0).
    """
    last = {name: value for name, value in stages[-1]["by_class"].items() if value is not None}
    best = {name: max(stage["by_class"][name] or 0.0 for stage in stages) for name in last}
    lost = [best[name] - value for name, value in last.items()]
    return {
        "average_accuracy": sum(last.values()) / len(last),
        "forgetting": sum(lost) / len(lost),
        "stages": len(stages),
    }


def accuracy_map(stages: Sequence[Stage]) -> HeatMap:
    """Return the accuracy of each class after each stage, in %."""
    names = list(stages[0]["by_class"])

    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * value

    return HeatMap(
        Path(PICTURE).stem,
        "Accuracy of each class after each stage",
        "% of the test rows of the class",
        names,
        [stage["trained"] for stage in stages],
        [[percent(stage["by_class"][name]) for stage in stages] for name in names],
        "A column is a stage, in which the rows of one class were trained on. A row that fades to "
        "the right is a class that is forgotten.",
        "class",
        "stages, by the class that was trained",
    )


def numbered(shown: HeatMap) -> HeatMap:
    """Return the map with numbers from 1 as columns, for which a picture has room."""
    columns = [str(i) for i in range(1, len(shown.columns) + 1)]
    return replace(shown, columns=columns, column_label="stage, from 1")


def stage_of(total: Tensor, classes: list[str], step: int, trained: int) -> Stage:
    """Return the scores of a stage.

    Args:
        total: of `SingleLabelTask.score`: the loss, then the confusion matrix (label, prediction).
        classes: names of all classes.
        step: the last of the stage.
        trained: the class of its rows.
    """
    C = len(classes)
    confusion = total[1:].double().cpu().view(C, C)
    rows, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    by_class = [r / n if n else None for r, n in zip(right, rows, strict=True)]
    return {
        "step": step,
        "trained": classes[trained],
        "accuracy": sum(right) / sum(rows),
        "by_class": dict(zip(classes, by_class, strict=True)),
    }
