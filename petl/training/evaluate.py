"""Evaluation: the scores of a model over rows."""

import logging
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from petl.core.lifecycle import lifecycle
from petl.data.batch_sampler import chunks
from petl.distributed.engine import is_sharded
from petl.errors import RunStopped
from petl.ops.scores import not_finite
from petl.training.dataloader import Splits, load, longest_first, to_device
from petl.training.generation import score_answers
from petl.training.non_finite import first_not_finite
from petl.training.predictions import Predictions

logger = logging.getLogger(__name__)
REPORT_ROWS = 256  # assumption: enough test rows for metrics of extra losses, which are slow


def score(
    model: PeftModel,
    splits: Splits,
    accelerator: Accelerator,
    batch_size: int,
    *,
    kept: Path | None = None,
) -> dict[str, float]:
    """Return the task's scores over the test rows, with those of generated answers if it generates.

    Metrics of extra losses over the first rows are added, except for a sharded model.

    Args:
        kept: the file that the predictions are written to, of each row; None: they are not kept.

    Raises:
        RunStopped: the outputs are not finite; the message names the first such tensor.
    """
    predictions = Predictions()
    scores = evaluate(
        model, splits, splits.test, accelerator, batch_size, predictions if kept else None
    )
    refuse_not_finite(scores, model, splits, accelerator, batch_size)
    if splits.task.generate is not None:
        scores |= score_answers(model, splits, accelerator, batch_size, predictions)
    if kept is not None and splits.sources is not None:
        predictions.write(kept, splits.task, splits.test, splits.sources, accelerator)
    if is_sharded(model):  # those metrics call single layers, which are not gathered then
        return scores
    rows = splits.test.select(range(min(REPORT_ROWS, len(splits.test))))
    # batches are divided, not their rows: padding, which some metrics count, does not depend on the
    # number of processes
    every = chunks(longest_first(splits.task.lengths(rows)), batch_size)
    mine = every[accelerator.process_index :: accelerator.num_processes]
    device = accelerator.device
    batches = load(rows, splits.collate, mine, device, workers=0)
    with accelerator.autocast():
        more = lifecycle(model).report(to_device(batch, device) for batch in batches)
    if more and len(rows) < len(splits.test):
        names = ", ".join(more)
        logger.info("%s: of the first %d of %d test examples", names, len(rows), len(splits.test))
    return scores | more


def refuse_not_finite(
    scores: dict[str, float],
    model: PeftModel,
    splits: Splits,
    accelerator: Accelerator,
    batch_size: int,
) -> None:
    """Raise RunStopped if a score on the test rows is NaN or infinite."""
    name = not_finite(scores)
    if name is None:
        return
    # of several processes, each has other rows: a search in some would leave the others waiting
    order = (
        longest_first(splits.task.lengths(splits.test)) if accelerator.num_processes == 1 else []
    )
    batches = chunks(order, batch_size)
    device, labels = accelerator.device, splits.task.label_columns
    inputs = (
        {name: tensor for name, tensor in to_device(batch, device).items() if name not in labels}
        for batch in load(splits.test, splits.collate, batches, device, workers=0)
    )
    with accelerator.autocast():
        where = first_not_finite(model.eval(), inputs)
    raise RunStopped(
        f"the outputs on the test examples are not finite ({name} is {scores[name]:g}): {where}; "
        "nothing is known about this model's scores"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    splits: Splits,
    rows: Dataset,
    accelerator: Accelerator,
    batch_size: int,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """Return the task's scores over `rows`; each row counts once, on any number of processes.

    Args:
        predictions: gets those of this process.
    """
    device, task = accelerator.device, splits.task
    order = longest_first(task.lengths(rows))
    mine = order[accelerator.process_index :: accelerator.num_processes]
    # every process runs as many passes as the first: a sharded model needs all of them in each
    each = math.ceil(len(order) / accelerator.num_processes)
    if task.by_row:  # gather needs equally many rows from each process
        own = batches = chunks(mine + order[: each - len(mine)], batch_size)
    else:
        own = chunks(mine, batch_size)
        # surplus batches keep the processes in step; their scores are cut off below
        batches = own + [order[:1]] * (math.ceil(each / batch_size) - len(own))
    was_training = model.training  # evaluation within training switches dropout off
    model.eval()
    parts = []
    loaded = load(rows, splits.collate, batches, device, workers=0)
    for positions, batch in zip(batches, loaded, strict=True):
        batch = to_device(batch, device)
        inputs = {name: tensor for name, tensor in batch.items() if name not in task.label_columns}
        with accelerator.autocast():
            outputs = model(**inputs)  # without labels: `score` computes the loss
        values = None
        if predictions is not None:
            values = task.predict(outputs, batch)
            predictions.add(positions, values)
        is_scored = values is not None and task.sums_predictions
        parts.append(values.sum(0) if is_scored else task.score(outputs, batch))
    model.train(was_training)
    if task.by_row:
        values = accelerator.gather(torch.cat(parts))
        return task.summarize_rows(in_order(values, order, accelerator.num_processes), rows)
    total = torch.stack(parts)[: len(own)].sum(0)
    return task.summarize(accelerator.reduce(total, reduction="sum"))


def in_order(gathered: Tensor, order: list[int], processes: int) -> Tensor:
    """Return gathered rows in the order of the data set.

    Process p of P has sent those at p, p + P, ... of `order`.
    """
    sent = gathered.unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)[: len(order)]
    placed = torch.empty_like(sent)
    # invert the permutation: position i of `sent` is row order[i]
    placed[torch.tensor(order, device=sent.device)] = sent
    return placed
