"""What the rows say without a trial: how many are doubtful, and a floor for what is predicted."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator
from datasets import Dataset

from petl.data.label_column import contradictions
from petl.data.models.loading import load_base
from petl.data.overlap import input_columns, input_texts, normalized
from petl.data.tasks.base import Task
from petl.data.tasks.classification import SingleLabelTask
from petl.training.dataloader import Splits
from petl.training.features import RunFeature, Setup
from petl.training.linear_probe import linear_probe
from petl.training.runs.config import RunConfig
from petl.training.wrapping import wrapped


def doubtful(task: Task, rows: Dataset) -> dict[str, int]:
    """Count raw rows (`read`), and those with the input of another one.

    That is but for case, space and punctuation: `repeated` are those that repeat an earlier one,
    `contradicted`, of rows with a class, those of which another one has another class. Empty: it is
    not known which columns are their input.
    """
    columns = input_columns(task, rows.column_names)
    if not columns:
        return {}
    # as numbers: the texts of all rows at once may fill the memory
    inputs = [hash(normalized(text)) for text in input_texts(rows, columns)]
    found = {"read": len(rows), "repeated": len(inputs) - len({*inputs})}
    if isinstance(task, SingleLabelTask) and "label" in rows.column_names:
        labeled = zip(inputs, rows["label"], strict=True)
        found["contradicted"] = contradictions([{"input": i, "label": n} for i, n in labeled])
    return found


def largest_class(splits: Splits) -> float | None:
    """Return the validation accuracy of the most frequent class of training; None without one."""
    task, rows = splits.task, splits.validation
    if not isinstance(task, SingleLabelTask) or rows is None:
        return None
    counts = task.label_counts(splits.known)
    return task.label_counts(rows)[max(counts, key=lambda name: counts[name])] / len(rows)


def probe(
    config: RunConfig, splits: Splits, features: Sequence[RunFeature], device: Accelerator
) -> float | None:
    """Return the validation score of a head alone on the frozen model; None if there is none."""
    assert splits.validation is not None, "train.eval_steps is set"
    task = splits.task
    if not (task.new_head and task.tensors_by_row):  # before weights are loaded
        return None
    held = replace(splits, test=splits.validation, sources=None)
    model = wrapped(Setup(load_base, config, splits, features, device))
    scores = linear_probe(model, held, config.train, device)
    return None if scores is None else scores[task.metric]
