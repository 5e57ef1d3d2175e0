"""Scores of a model over rows."""

import math

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from petl.core.lifecycle import lifecycle
from petl.data.batch_sampler import chunks
from petl.distributed.engine import is_sharded
from petl.training.dataloader import Splits, load, longest_first, to_device
from petl.training.generation import score_answers

FIGURE_ROWS = 256  # of the test rows, for figures that take many passes


def score(
    model: PeftModel, splits: Splits, accelerator: Accelerator, batch_size: int
) -> dict[str, float]:
    """The task's scores over the test rows, those of generated answers among them if the task is to
    generate; figures of extra losses over the first rows, but of a sharded model.
    """
    scores = evaluate(model, splits, splits.test, accelerator, batch_size)
    if splits.task.generate is not None:
        scores |= score_answers(model, splits, accelerator, batch_size)
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
    # every process takes part in as many passes as the first: where the model is sharded, in each
    each = math.ceil(len(order) / accelerator.num_processes)
    if task.by_row:  # rows are gathered, so all send equally many
        own = batches = chunks(mine + order[: each - len(mine)], batch_size)
    else:
        own = chunks(mine, batch_size)
        batches = own + [order[:1]] * (math.ceil(each / batch_size) - len(own))
    was_training = model.training
    model.eval()
    parts = []
    for batch in load(rows, splits.collate, batches, device, workers=0):
        batch = to_device(batch, device)
        inputs = {name: tensor for name, tensor in batch.items() if name not in task.label_columns}
        with accelerator.autocast():
            outputs = model(**inputs)  # without labels: `score` has its own loss
        parts.append(task.score(outputs, batch))
    model.train(was_training)
    if task.by_row:
        figures = accelerator.gather(torch.cat(parts))
        return task.summarize_rows(in_order(figures, order, accelerator.num_processes), rows)
    total = torch.stack(parts)[: len(own)].sum(0)
    return task.summarize(accelerator.reduce(total, reduction="sum"))


def in_order(gathered: Tensor, order: list[int], processes: int) -> Tensor:
    """Rows in the order of the data set: process p sent those at p, p + P, ... of `order`."""
    dealt = gathered.unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)[: len(order)]
    placed = torch.empty_like(dealt)
    placed[torch.tensor(order, device=dealt.device)] = dealt
    return placed
