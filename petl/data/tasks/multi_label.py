"""Multi-label classification: any number of classes for each text.

A class is predicted if its probability reaches a threshold, which validation rows choose. Scores
are those of scikit-learn: micro F1 counts all pairs of a row and a class alike, macro F1 is the
mean F1 of the classes, 0 for one that is in no label and no prediction.

Shapes: B rows, C classes, K steps of the probability from 0 to 1.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from petl.data.tasks import THRESHOLD
from petl.data.tasks.base import (
    Batch,
    Columns,
    Fields,
    Outputs,
    Prediction,
    Row,
    TextTask,
    rounded,
    sums_dtype,
)
from petl.data.tasks.classification import MAX_LISTED, MOST_PROBABLE, SMALLEST, ClassTask
from petl.system.values import field, integer

STEPS = 100  # K; thresholds are multiples of 1 / K
UNTUNED = 0.5  # threshold of a run without validation rows


@dataclass
class MultiLabel(TextTask, ClassTask[PreTrainedTokenizerBase]):
    """Texts with the numbers of all of their classes (`label`, a list)."""

    name: ClassVar[str] = "multi_label"
    loss_unit: ClassVar[str] = " (nats per class)"
    metric: ClassVar[str] = "micro_f1"
    encoded_by: ClassVar[tuple[str, ...]] = ("max_length", "classes")

    max_length: int = field(128, integer(1))
    # from which probability on a class is predicted; None: validation rows choose it
    threshold: float | None = field(None, THRESHOLD)

    def model_kwargs(self) -> Fields:
        """Number and names of the classes, and the type of the model's loss."""
        return {**super().model_kwargs(), "problem_type": "multi_label_classification"}

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Tokenize the texts; `labels` has 0.0 or 1.0 for each class, [C]."""
        encoded = super().encode_rows(tokenizer, rows)
        if "label" in rows:
            numbers = range(len(self.classes))
            encoded["labels"] = [[float(n in own) for n in numbers] for own in rows["label"]]
        return encoded

    def label_text(self, row: Row) -> str:
        """The names of the row's classes."""
        return ", ".join(self.named(np.asarray(row["labels"]) > 0)) or "none"

    def label_counts(self, rows: Dataset) -> dict[str, int]:
        """Number of rows of each class."""
        counts = np.asarray(rows["labels"]).sum(0).astype(int) if len(rows) else ()
        return dict(zip(self.classes, map(int, counts), strict=False))

    def named(self, has: np.ndarray) -> list[str]:
        """The names of the classes at which `has`, [C], is True."""
        return [self.classes[i] for i in np.flatnonzero(has)]

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Summed mean loss of each row, then how often a class has a probability: [1 + 2 C K].

        The counts are by label (0 or 1), class and step, so that scores at any threshold follow.
        """
        logits, labels = outputs.logits.float(), batch["labels"]
        C, dtype = len(self.classes), sums_dtype(logits.device)
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        # a probability that is NaN has some step; the loss tells it
        steps = (logits.sigmoid() * STEPS).long().clamp_(0, STEPS - 1)
        cells = ((labels > 0).long() * C + torch.arange(C, device=logits.device)) * STEPS + steps
        counts = torch.zeros(2 * C * STEPS, dtype=dtype, device=logits.device)
        counts.index_add_(0, cells.flatten(), torch.ones_like(cells.flatten(), dtype=dtype))
        return torch.cat([losses.mean(1).sum().to(dtype)[None], counts])

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Micro and macro F1, loss in nats per row and class, threshold, number of rows."""
        threshold = UNTUNED if self.threshold is None else self.threshold
        hits, predicted, labeled = self.counts(total)
        hits, predicted = (each[:, round(threshold * STEPS)] for each in (hits, predicted))
        rows = total[1:].sum().item() / len(self.classes)
        return {
            "micro_f1": f1(hits.sum(), predicted.sum(), labeled.sum()).item(),
            "macro_f1": f1(hits, predicted, labeled).mean().item(),
            "loss": total[0].item() / rows,
            "threshold": threshold,
            "rows": rows,
        }

    def counts(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each class, how often it is predicted rightly, predicted, and in a label.

        Returns:
            The first two by threshold, [C, K], the third [C].
        """
        cells = total[1:].double().cpu().view(2, len(self.classes), STEPS)
        reached = cells.flip(-1).cumsum(-1).flip(-1)  # its probability is this step or a higher one
        return reached[1], reached.sum(0), cells[1].sum(-1)

    def tuned(self, total: Tensor) -> "MultiLabel":
        """This task with the threshold of the highest micro F1; of equal ones, nearest to 0.5."""
        if self.threshold is not None:
            return self
        hits, predicted, labeled = self.counts(total)
        scores = f1(hits.sum(0), predicted.sum(0), labeled.sum())[1:].tolist()
        best = max(range(1, STEPS), key=lambda k: (scores[k - 1], -abs(k - STEPS / 2)))
        return replace(self, threshold=best / STEPS)

    def settle(self, scores: Mapping[str, float]) -> None:
        """Take the threshold of the scores on validation rows."""
        if self.threshold is None:
            self.threshold = scores.get("threshold", UNTUNED)

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The probability of each class, [B, C]."""
        return outputs.logits.float().sigmoid()

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The predicted classes, probabilities by class, and loss in nats of labeled rows.

        Of more than `MAX_LISTED` classes, the probabilities are those of the first `MOST_PROBABLE`.
        """
        threshold = UNTUNED if self.threshold is None else self.threshold
        for value, row in zip(values, rows, strict=True):
            listed = range(len(value))
            if len(value) > MAX_LISTED:
                listed = np.argsort(-value, kind="stable")[:MOST_PROBABLE].tolist()
            # as `score` counts them
            reached = (value * STEPS).astype(int) >= round(threshold * STEPS)
            described: Prediction = {
                "prediction": self.named(reached),
                "probabilities": {self.classes[i]: rounded(value[i]) for i in listed},
            }
            if "labels" in row:
                has = np.asarray(row["labels"]) > 0
                right = np.where(has, value, 1 - value)
                loss = -np.log(np.maximum(right, SMALLEST)).mean()
                described = {"label": self.named(has), **described, "loss": rounded(loss)}
            yield row["_number"], described

    @property
    def varied(self) -> tuple[str, ...]:
        """See `Task.varied`."""
        return ("probabilities",) if len(self.classes) > MAX_LISTED else ()

    def head_loss(self, logits: Tensor, labels: Batch) -> Tensor:
        """Mean binary cross-entropy, from logits [B, C]."""
        return F.binary_cross_entropy_with_logits(logits, labels["labels"])


def f1(hits: Tensor, predicted: Tensor, labeled: Tensor) -> Tensor:
    """F1 from counts; 0 where there is nothing to divide by."""
    both = predicted + labeled
    return torch.where(both > 0, 2 * hits / both, 0.0)
