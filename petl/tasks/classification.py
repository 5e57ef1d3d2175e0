"""Classification: one class a row. Here of texts; of images and sounds in media.py.

Scores follow scikit-learn: macro F1 averages over the classes that occur in truth or guesses, and
Matthews' correlation is 0 where it is not defined.
"""

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from petl.errors import InputError
from petl.tasks.base import Task, pad_id, sums_dtype
from petl.tasks.rows import Columns, Pad, Row


@dataclass
class OneClass(Task, ABC):
    """Rows with the number of their class (`label`)."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    classes: list[str]

    @property
    def labels(self) -> list[str]:
        return self.classes

    def model_kwargs(self) -> dict[str, Any]:
        return {**class_names(self.classes), "problem_type": "single_label_classification"}

    def truth(self, row: Row) -> str:
        return self.classes[int(row["labels"])]

    def counts(self, rows: Dataset) -> dict[str, int]:
        found = np.bincount(np.asarray(rows["labels"]), minlength=len(self.classes))
        return dict(zip(self.classes, found.tolist(), strict=True))

    def items(self, batch: dict[str, Tensor]) -> int:
        return batch["labels"].numel()

    def score(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Summed loss in nats, then the confusion matrix row by row (truth by guess): [1 + C*C]."""
        logits, truth = outputs.logits, batch["labels"]
        C = len(self.classes)
        dtype = sums_dtype(logits.device)
        loss = F.cross_entropy(logits.float(), truth, reduction="sum").to(dtype)
        cells = truth * C + logits.argmax(-1)
        # index_add_, not bincount: that one asks the device how long its result is
        confusion = torch.zeros(C * C, dtype=dtype, device=logits.device)
        confusion.index_add_(0, cells, torch.ones_like(cells, dtype=dtype))
        return torch.cat([loss[None], confusion])

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Accuracy, macro F1, Matthews' correlation, loss in nats a row, rows."""
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

    def head_loss(self, logits: Tensor, truths: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits, truths["labels"])


def class_names(classes: list[str]) -> dict[str, Any]:
    """The classes as a model's config has them."""
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {label: i for i, label in enumerate(classes)},
    }


def macro_f1(confusion: Tensor) -> float:
    """The mean F1 of classes, from how often [C, C] a class was taken for a class."""
    hits, occurs = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    return (2 * hits[occurs > 0] / occurs[occurs > 0]).mean().item()


def matthews(confusion: Tensor) -> float:
    """Matthews' correlation, of any number of classes (Gorodkin 2004), from the same."""
    rows, truth, guess = confusion.sum(), confusion.sum(1), confusion.sum(0)
    covariance = confusion.diagonal().sum() * rows - truth @ guess
    spread = (rows**2 - truth @ truth) * (rows**2 - guess @ guess)
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


@dataclass
class Texts(Task, ABC):
    """Rows of one text (`text`), or of two (`text_pair` as well), about which one thing is said."""

    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    one_for_one: ClassVar[bool] = True

    @property
    def auto_class(self) -> type[Any]:
        return AutoModelForSequenceClassification

    def settings(self) -> dict[str, Any]:
        return {"task": self.name, "max_length": self.max_length}

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> Columns:
        pair = rows.get("text_pair")
        # of two texts, the longer one is cut first
        encoded = tokenizer(rows["text"], pair, truncation=True, max_length=self.max_length)
        ids = encoded["input_ids"]
        for text, tokens in zip(rows["text"], ids, strict=True):
            if not tokens:
                raise InputError(
                    f"the text {text!r} has no tokens for this model's tokenizer: leave it out"
                )
        columns = {
            "input_ids": ids,
            "attention_mask": encoded["attention_mask"],
            "labels": rows["label"],
        }
        if pair is not None and "token_type_ids" in encoded:  # which text a token is of
            columns["token_type_ids"] = encoded["token_type_ids"]
        return columns

    def collate(
        self, tokenizer: PreTrainedTokenizerBase, multiple: int = 1
    ) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        return partial(batch_of_texts, Pad(pad_id(tokenizer), multiple))


@dataclass
class Classification(Texts, OneClass):
    """Texts with the number of their class (`label`)."""

    name: ClassVar[str] = "classification"

    max_length: int = 128


def batch_of_texts(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], `labels` [B]: int64, or float32 of numbers."""
    labels = torch.tensor([row["labels"] for row in rows])
    return {**pad.inputs(rows), "labels": labels}
