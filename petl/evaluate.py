"""Scores of a model over rows."""

import math

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import nn

from petl.batches import Splits, chunks, load, longest_first, to_device
from petl.core.lifecycle import lifecycle
from petl.sharding import is_sharded

FIGURE_ROWS = 256  # of the test rows, for figures that take many passes


def score(
    model: PeftModel, splits: Splits, accelerator: Accelerator, batch_size: int
) -> dict[str, float]:
    """The task's scores over the test rows; figures of extra losses over the first of them.

    Of a sharded model there are no such figures.
    """
    scores = evaluate(model, splits, splits.test, accelerator, batch_size)
    if is_sharded(model):  # those figures take single layers, which are not whole then
        return scores
    rows = splits.test.select(range(min(FIGURE_ROWS, len(splits.test))))
    # whole batches go to a process: padding, and figures that count it, are then always the same
    whole = chunks(longest_first(splits.task.lengths(rows)), batch_size)
    mine = whole[accelerator.process_index :: accelerator.num_processes]
    device = accelerator.device
    batches = load(rows, splits.collate, mine, device, workers=0)
    with accelerator.autocast():
        return scores | lifecycle(model).report(to_device(batch, device) for batch in batches)


@torch.no_grad()
def evaluate(
    model: nn.Module, splits: Splits, rows: Dataset, accelerator: Accelerator, batch_size: int
) -> dict[str, float]:
    """The task's scores over `rows`, each counted once whatever the number of processes."""
    device, task = accelerator.device, splits.task
    order = longest_first(task.lengths(rows))
    mine = order[accelerator.process_index :: accelerator.num_processes]
    batches = chunks(mine, batch_size)
    # as many for each process as the first has: where the model is sharded, all take part in each
    spares = math.ceil(math.ceil(len(order) / accelerator.num_processes) / batch_size)
    spares -= len(batches)
    was_training = model.training
    model.eval()
    sums = []
    for batch in load(rows, splits.collate, batches + [[0]] * spares, device, workers=0):
        batch = to_device(batch, device)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with accelerator.autocast():
            outputs = model(**inputs)  # without labels: `score` has its own loss
        sums.append(task.score(outputs, batch))
    model.train(was_training)
    total = torch.stack(sums)[: len(batches)].sum(0)
    return task.summarize(accelerator.reduce(total, reduction="sum"))
