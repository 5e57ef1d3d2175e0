"""Scores after each stage of a class-incremental stream (data.order=by_class)."""

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from petl.system.collectives import on_main
from petl.system.files.disk import stop_when_full
from petl.training.dataloader import Splits, longest_first
from petl.training.evaluate import Part, one_pass
from petl.training.runs.class_stream import Stage, read_stages, write_stages
from petl.training.runs.run_folder import Run


@torch.no_grad()
def score_stage(
    model: PeftModel, splits: Splits, accelerator: Accelerator, run: Run, batch_size: int, step: int
) -> None:
    """Score the test rows of all classes if `step` ends a stage, and add that to stages.json."""
    stream, task = splits.stages, splits.task
    if stream is None or step not in stream.ends:
        return
    order = longest_first(task.lengths(splits.test))
    number = list(stream.ends).index(step) + 1
    what = f"scoring all classes after stage {number} of {len(stream.ends)}"
    part = Part(splits.test, order)
    total = one_pass(model, splits, part, accelerator, batch_size, None, what)
    stage = stage_of(total, task.labels or [], step, stream.ends[step])

    def write() -> None:
        # a run that was stopped after this stage, and resumed before it, has it already
        earlier = read_stages(run.path, step - 1)
        with stop_when_full(run.path):
            write_stages(run.path, [*earlier, stage])

    on_main(accelerator, write)
    run.log.append({"step": step, "stage_accuracy": stage["accuracy"]})


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
