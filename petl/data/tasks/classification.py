"""Classification: one class per row. Texts are here, images and sounds in media.py.

Scores follow scikit-learn: macro F1 averages over the classes that occur in labels or predictions,
and Matthews' correlation is 0 where it is undefined. They are computed from a confusion matrix on
the device, which adds over batches and processes; scikit-learn is not a dependency.
"""

import math
from abc import ABC
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from petl.data.tasks import CLASSES
from petl.data.tasks.base import (
    Batch,
    Fields,
    Outputs,
    P,
    Prediction,
    Row,
    Task,
    TextTask,
    rounded,
    sums_dtype,
)
from petl.data.tasks.encoding_cache import values_of
from petl.system.values import field, integer

MAX_LISTED = 100  # classes, up to which a prediction has the probability of each
MOST_PROBABLE = 10  # classes that a prediction lists if there are more
SMALLEST = 1e-38  # probability, in the loss of a class that has probability 0 in float32


@dataclass
class ClassTask(Task[P], ABC):
    """Rows, or words of rows, with the number of a class."""

    higher_is_better: ClassVar[bool] = True

    classes: list[str] = field(MISSING, CLASSES)

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return self.classes

    def model_kwargs(self) -> Fields:
        """Number and names of the classes."""
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {label: i for i, label in enumerate(self.classes)},
        }


@dataclass
class SingleLabelTask(ClassTask[P], ABC):
    """Rows with the number of one class (`label`)."""

    metric: ClassVar[str] = "accuracy"

    def model_kwargs(self) -> Fields:
        """Number and names of the classes, and the type of the model's loss."""
        return {**super().model_kwargs(), "problem_type": "single_label_classification"}

    def label_text(self, row: Row) -> str:
        """The name of the row's class."""
        return self.classes[int(row["labels"])]

    def label_counts(self, rows: Dataset) -> dict[str, int]:
        """Number of rows of each class."""
        labels = np.asarray([*values_of(rows, "labels")], dtype=int)
        counts = np.bincount(labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def items(self, batch: Batch) -> int:
        """Number of rows."""
        return batch["labels"].numel()

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Summed loss in nats, then the confusion matrix (label, prediction): [1 + C*C]."""
        logits, labels = outputs.logits, batch["labels"]
        C = len(self.classes)  # number of classes
        dtype = sums_dtype(logits.device)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum").to(dtype)
        cells = labels * C + logits.argmax(-1)
        # index_add_, not bincount, which synchronizes with the device to size its result
        confusion = torch.zeros(C * C, dtype=dtype, device=logits.device)
        confusion.index_add_(0, cells, torch.ones_like(cells, dtype=dtype))
        return torch.cat([loss[None], confusion])

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Accuracy, macro F1, Matthews' correlation, loss in nats per row, number of rows."""
        C = len(self.classes)
        loss, confusion = total[0].double().cpu(), total[1:].double().cpu().view(C, C)
        rows = confusion.sum()
        return {
            "accuracy": (confusion.diagonal().sum() / rows).item(),
            "macro_f1": macro_f1(confusion),
            "matthews": matthews(confusion),
            "loss": (loss / rows).item(),
            "rows": rows.item(),
        }

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The probability of each class, [B, C]."""
        return outputs.logits.float().softmax(-1)

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The most probable class, probabilities by class, and loss in nats of labeled rows.

        Of more than `MAX_LISTED` classes, the probabilities are those of the first `MOST_PROBABLE`.
        """
        for value, row in zip(values, rows, strict=True):
            described = self.described_class(value)
            if "labels" in row:
                label = int(row["labels"])
                loss = -math.log(max(float(value[label]), SMALLEST))
                described = {"label": self.classes[label], **described, "loss": rounded(loss)}
            yield row["_number"], described

    @property
    def varied(self) -> tuple[str, ...]:
        """See `Task.varied`."""
        return ("probabilities",) if len(self.classes) > MAX_LISTED else ()

    def described_class(self, value: np.ndarray) -> Prediction:
        """The prediction of one row, from its probabilities, [C]."""
        best = int(value.argmax())
        listed = range(len(value))
        if len(value) > MAX_LISTED:
            listed = np.argsort(-value, kind="stable")[:MOST_PROBABLE].tolist()
        return {
            "prediction": self.classes[best],
            "probability": rounded(value[best]),
            "probabilities": {self.classes[i]: rounded(value[i]) for i in listed},
        }

    def head_loss(self, logits: Tensor, labels: Batch) -> Tensor:
        """Mean cross-entropy, from logits [B, C]."""
        return F.cross_entropy(logits, labels["labels"])


def matthews(confusion: Tensor) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004), from the same matrix."""
    rows, labels, predictions = confusion.sum(), confusion.sum(1), confusion.sum(0)
    # Gorodkin 2004, with sums over classes in place of covariances
    covariance = confusion.diagonal().sum() * rows - labels @ predictions
    spread = (rows**2 - labels @ labels) * (rows**2 - predictions @ predictions)
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


@dataclass
class Classification(TextTask, SingleLabelTask[PreTrainedTokenizerBase]):
    """Texts with the number of their class (`label`)."""

    name: ClassVar[str] = "classification"
    loss_unit: ClassVar[str] = " (nats per example)"

    max_length: int = field(128, integer(1))


def macro_f1(confusion: Tensor) -> float:
    """The mean F1 of classes, from a confusion matrix (label, prediction), [C, C]."""
    # F1 of a class = 2 TP / (predicted + labeled); classes that never occur are left out
    hits, occurs = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    return (2 * hits[occurs > 0] / occurs[occurs > 0]).mean().item()
