"""Classification of texts for several tasks: a head for each, as slices of one layer.

The model has the classes of all tasks, those of a task one after the other. Loss, scores and
predictions of a row compare the classes of its own task only, which is the same as a head for each
task: the rows of the last layer are the heads, and no logit of another task has a part in the loss.

Shapes: B rows, C classes of all tasks, K tasks.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petl.core.layers.class_swap import SwappedClass, swap_class
from petl.core.layers.task_rows import ARGUMENT, PASSED
from petl.data.tasks import COLUMN, IDS, SEPARATOR
from petl.data.tasks.base import (
    UNTRUNCATED,
    Batch,
    Columns,
    Outputs,
    Prediction,
    Row,
    rounded,
    sums_dtype,
)
from petl.data.tasks.classification import SMALLEST, Classification, macro_f1
from petl.data.tasks.row_tasks import RowTasks
from petl.errors import InputError

logger = logging.getLogger(__name__)


def task_of(classes: Tensor, starts: Sequence[int]) -> Tensor:
    """The task of each class number; `starts` are the numbers of the tasks' first classes."""
    task = torch.zeros_like(classes)
    # comparisons with constants: nothing is copied to the device
    for start in starts[1:]:
        task += classes >= start
    return task


def own_logits(logits: Tensor, tasks: Tensor, starts: Sequence[int]) -> Tensor:
    """Logits [B, C] in float32, with -inf for classes that are not of the row's task, [B]."""
    of_class = task_of(torch.arange(logits.shape[-1], device=logits.device), starts)
    return logits.float().masked_fill(of_class != tasks[:, None], -math.inf)


class TaskHeads(SwappedClass):
    """Mixin for a text classifier whose loss is that of a head for each task.

    Logits are those of all classes. `task_ids` in its arguments are for adapters and not read: the
    label has the task.

    Attributes:
        petl_task_starts: the number of each task's first class.
    """

    petl_task_starts: list[int]

    def forward(self, *args: object, labels: Tensor | None = None, **kwargs: object) -> object:
        kwargs = {name: v for name, v in kwargs.items() if name not in (ARGUMENT, PASSED)}
        own: Any = super()
        # without labels, so that the model computes no loss over all classes
        output = own.forward(*args, **kwargs)
        if labels is None:
            return output
        is_tuple = isinstance(output, tuple)
        starts = self.petl_task_starts
        logits = output[0] if is_tuple else output["logits"]
        loss = F.cross_entropy(own_logits(logits, task_of(labels, starts), starts), labels)
        if is_tuple:
            return (loss, *output)
        output["loss"] = loss
        return output


@dataclass
class MultitaskClassification(RowTasks[PreTrainedTokenizerBase], Classification):
    """Texts with their task (`task`) and the number of their class among those of all tasks.

    Attributes:
        classes: TASK/LABEL, those of a task one after the other, in the order of `tasks`.
        max_length: the largest of `limits`.
        tasks: their names.
        limits: maximum number of tokens of a row, for each task.
        pairs: names of the tasks whose rows have a second text.
    """

    name: ClassVar[str] = "multitask_classification"
    metric: ClassVar[str] = "mean_accuracy"
    encoded_by: ClassVar[tuple[str, ...]] = ("max_length", "limits", "pairs", "classes")
    scores_by_task: ClassVar[bool] = True
    file_kind: ClassVar[str | None] = Classification.name
    shown: ClassVar[tuple[str, ...]] = (*Classification.shown, COLUMN)

    tasks: list[str] = field(default_factory=list)  # ty: ignore[incompatible-mutable-override]
    limits: list[int] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        owners = [name.partition(SEPARATOR)[0] for name in self.classes]
        runs = [owner for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]
        if runs != [*self.tasks] or not all(SEPARATOR in name for name in self.classes):
            raise InputError(
                f"classes {self.classes} are not those of the tasks {self.tasks}, one after the "
                "other and named TASK/LABEL"
            )
        lengths_fit = len(self.limits) == len(self.tasks) and self.max_length == max(self.limits)
        if not lengths_fit or min(self.limits) < 1:
            raise InputError(
                f"limits={self.limits} are not the lengths of {len(self.tasks)} tasks, the largest "
                f"of them max_length={self.max_length}"
            )
        if not {*self.pairs} <= {*self.tasks}:
            raise InputError(f"pairs={self.pairs} are not all tasks: {', '.join(self.tasks)}")
        self.starts = [owners.index(name) for name in self.tasks]

    def __reduce__(self) -> tuple[object, ...]:
        # unlike a class that `of_tasks` generates, this one can be imported by name
        return type(self), (self.classes, self.max_length, self.tasks, self.limits, self.pairs)

    def own_classes(self, task: int) -> list[str]:
        """The labels of a task, without its name."""
        begin = len(self.tasks[task]) + len(SEPARATOR)
        return [name[begin:] for name in self.classes[self.slice_of(task)]]

    def slice_of(self, task: int) -> slice:
        """The place of a task's classes among all."""
        return slice(self.starts[task], [*self.starts, len(self.classes)][task + 1])

    def adjust(self, model: PreTrainedModel) -> None:
        """Give a classifier the loss of a head for each task."""
        swap_class(model, TaskHeads)
        cast("TaskHeads", model).petl_task_starts = self.starts

    # Rows

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Encode the rows of each task as its own set would be."""
        ids = [self.tasks.index(name) for name in rows[COLUMN]]
        encoded: list[Row] = [{} for _ in ids]
        for task in sorted(set(ids)):
            own = [i for i, other in enumerate(ids) if other == task]
            # of a set without pairs, the column holds None
            names = [n for n in rows if n != "text_pair" or self.tasks[task] in self.pairs]
            part = {name: [rows[name][i] for i in own] for name in names}
            alone = Classification(self.classes, max_length=self.limits[task])
            found = alone.encode_rows(tokenizer, part)
            for place, values in zip(own, zip(*found.values(), strict=True), strict=True):
                encoded[place] = dict(zip(found, values, strict=True))
        # rows of one text have the token types that they would have by default
        if self.pairs and "token_type_ids" in tokenizer.model_input_names:
            for row in encoded:
                row.setdefault("token_type_ids", [0] * len(row["input_ids"]))
        columns = {name: [row[name] for row in encoded] for name in encoded[0]}
        return {**columns, IDS: ids}

    def untruncated(self) -> "MultitaskClassification":
        limits = [UNTRUNCATED] * len(self.tasks)
        return replace(self, max_length=UNTRUNCATED, limits=limits)

    def is_truncated(self, row: Row) -> bool:
        return len(row["input_ids"]) > self.limits[row[IDS]]

    # Scores

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss of each task in nats, then the confusion matrix (label, prediction): [K + C*C]."""
        labels, (K, C) = batch["labels"], (len(self.tasks), len(self.classes))
        tasks = task_of(labels, self.starts)
        logits = own_logits(outputs.logits, tasks, self.starts)
        dtype = sums_dtype(logits.device)
        losses = F.cross_entropy(logits, labels, reduction="none").to(dtype)
        total = torch.zeros(K + C * C, dtype=dtype, device=logits.device)
        total.index_add_(0, tasks, losses)
        cells = K + labels * C + logits.argmax(-1)
        return total.index_add_(0, cells, torch.ones_like(losses))

    def summarize(self, total: Tensor) -> dict[str, float]:
        """The means of the tasks' scores, loss and accuracy over all rows, scores by task.

        A task without rows has no scores, and no part in the means.
        """
        K, C = len(self.tasks), len(self.classes)
        losses, matrix = total[:K].double().cpu(), total[K:].double().cpu().view(C, C)
        by_task: dict[str, dict[str, float]] = {}
        for task, name in enumerate(self.tasks):
            own = matrix[self.slice_of(task), self.slice_of(task)]
            rows = own.sum()
            if rows == 0:
                logger.warning("no examples of task %s are among those that are scored", name)
                continue
            accuracy = (own.diagonal().sum() / rows).item()
            loss = (losses[task] / rows).item()
            by_task[name] = {"accuracy": accuracy, "macro_f1": macro_f1(own), "loss": loss}
        means = {
            f"mean_{name}": sum(scores[name] for scores in by_task.values()) / len(by_task)
            for name in ("accuracy", "macro_f1")
        }
        rows = matrix.sum()
        pooled = {
            "accuracy": (matrix.diagonal().sum() / rows).item(),
            "loss": (losses.sum() / rows).item(),
            "rows": rows.item(),
        }
        named = {f"{task}_{k}": v for task, scores in by_task.items() for k, v in scores.items()}
        return {**means, **pooled, **named}

    def head_loss(self, logits: Tensor, labels: Batch) -> Tensor:
        """Mean cross-entropy among the classes of each row's task, from logits [B, C]."""
        tasks = task_of(labels["labels"], self.starts)
        return F.cross_entropy(own_logits(logits, tasks, self.starts), labels["labels"])

    # Predictions

    @property
    def varied(self) -> tuple[str, ...]:
        """See `Task.varied`: each row has the classes of its task."""
        return ("probabilities",)

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The probability of each class, [B, C]; 0 for those of other tasks."""
        return own_logits(outputs.logits, batch[IDS], self.starts).softmax(-1)

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """As `Classification.described`, with the labels of the row's own task."""
        for value, row in zip(values, rows, strict=True):
            # the classes of other tasks have probability 0
            task = int(np.searchsorted(self.starts, value.argmax(), side="right")) - 1
            own, place = self.own_classes(task), self.slice_of(task)
            alone = Classification(own, max_length=self.limits[task])
            described = alone.described_class(value[place])
            if "labels" in row:
                label = int(row["labels"])
                loss = -math.log(max(float(value[label]), SMALLEST))
                name = own[label - place.start]
                described = {"label": name, **described, "loss": rounded(loss)}
            yield row["_number"], described
