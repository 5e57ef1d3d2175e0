"""Regression: one number per row of text.

Correlations are own code: scipy is only installed with the extra `audio`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from petl.data.tasks.base import (
    Batch,
    Fields,
    Outputs,
    Prediction,
    Row,
    TextTask,
    rounded,
    sums_dtype,
)
from petl.system.values import field, integer


@dataclass
class Regression(TextTask):
    """Texts with a number (`label`)."""

    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "pearson"
    higher_is_better: ClassVar[bool] = True
    by_row: ClassVar[bool] = True  # ranks need all rows

    max_length: int = field(128, integer(1))

    def model_kwargs(self) -> Fields:
        """One output without class names."""
        names = {"id2label": {0: "number"}, "label2id": {"number": 0}}
        return {"num_labels": 1, "problem_type": "regression", **names}

    def label_text(self, row: Row) -> str:
        """The number of the row."""
        return f"{row['labels']:g}"

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Prediction and label of each row, [B, 2]."""
        prediction = outputs.logits.squeeze(-1)
        return torch.stack([prediction, batch["labels"]], -1).to(sums_dtype(prediction.device))

    def summarize_rows(self, values: Tensor, rows: Dataset) -> dict[str, float]:
        """Pearson's and Spearman's correlation, mean squared error, number of rows.

        A correlation with a constant is undefined, and 0 here.
        """
        predictions, labels = values.double().cpu().unbind(-1)
        return {
            "pearson": correlation(predictions, labels),
            "spearman": correlation(ranks(predictions), ranks(labels)),
            "mse": F.mse_loss(predictions, labels).item(),
            "rows": float(len(labels)),
        }

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The predicted number, [B]."""
        return outputs.logits.squeeze(-1).float()

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The predicted number."""
        for value, row in zip(values, rows, strict=True):
            label = {"label": row["labels"]} if "labels" in row else {}
            yield row["_number"], {**label, "prediction": rounded(value)}

    def head_loss(self, logits: Tensor, labels: Batch) -> Tensor:
        """Mean squared error, from logits [B, 1]."""
        return F.mse_loss(logits.squeeze(-1), labels["labels"])


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two columns, [N] each; 0 if one of them is constant."""
    # before the means are subtracted, which leaves a rounding error of each value of a constant
    if any(each.unique().numel() < 2 for each in (x, y)):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    spread = x.norm() * y.norm()
    return (x @ y / spread).item() if spread > 0 else 0.0


def ranks(values: Tensor) -> Tensor:
    """The rank of each value, from 1, [N] float64; equal values share the mean of their ranks."""
    _, index, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()  # of equal values, which have the ranks up to this one
    return (last - (count - 1) / 2)[index]
