"""Regression: one number a row of text."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from petl.tasks.base import sums_dtype
from petl.tasks.classification import Texts
from petl.tasks.rows import Row


@dataclass
class Regression(Texts):
    """Texts with a number (`label`)."""

    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "pearson"
    higher_is_better: ClassVar[bool] = True
    by_row: ClassVar[bool] = True  # ranks are known when all rows are

    max_length: int = 128

    def model_kwargs(self) -> dict[str, Any]:
        names = {"id2label": {0: "number"}, "label2id": {"number": 0}}
        return {"num_labels": 1, "problem_type": "regression", **names}

    def truth(self, row: Row) -> str:
        return f"{row['labels']:g}"

    def items(self, batch: dict[str, Tensor]) -> int:
        return batch["labels"].numel()

    def score(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """The guess and the truth, [B, 2]."""
        guess = outputs.logits.squeeze(-1)
        return torch.stack([guess, batch["labels"]], -1).to(sums_dtype(guess.device))

    def summarize_rows(self, figures: Tensor, rows: Dataset) -> dict[str, float]:
        """Pearson's and Spearman's correlation, mean squared error, rows.

        A correlation with something that does not vary is not defined, and 0 here.
        """
        guess, truth = figures.double().cpu().unbind(-1)
        return {
            "pearson": correlation(guess, truth),
            "spearman": correlation(ranks(guess), ranks(truth)),
            "mse": F.mse_loss(guess, truth).item(),
            "rows": float(len(truth)),
        }

    def head_loss(self, logits: Tensor, truths: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(logits.squeeze(-1), truths["labels"])


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two columns, each [N]."""
    x, y = x - x.mean(), y - y.mean()
    spread = x.norm() * y.norm()
    return (x @ y / spread).item() if spread > 0 else 0.0


def ranks(values: Tensor) -> Tensor:
    """The rank of each value, from 1, [N] float64; equal values share the mean of their ranks."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]
