"""Classification: one class a row. Here of texts; of images and sounds in media.py."""

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from petl.errors import InputError
from petl.tasks.base import Columns, Pad, Row, Task, pad_id, sums_dtype


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
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {label: i for i, label in enumerate(self.classes)},
            "problem_type": "single_label_classification",
        }

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
        """Accuracy, macro F1, loss in nats a row, rows.

        Macro F1 averages over the classes that occur in truth or guesses, as scikit-learn does.
        """
        C = len(self.classes)
        loss, confusion = total[0].double().cpu(), total[1:].double().cpu().view(C, C)
        rows, hits = confusion.sum(), confusion.diagonal()
        occurs = confusion.sum(0) + confusion.sum(1)
        f1 = 2 * hits[occurs > 0] / occurs[occurs > 0]
        return {
            "accuracy": (hits.sum() / rows).item(),
            "macro_f1": f1.mean().item(),
            "loss": (loss / rows).item(),
            "rows": rows.item(),
        }


@dataclass
class Classification(OneClass):
    """Texts (`text`) with the number of their class (`label`)."""

    name: ClassVar[str] = "classification"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    max_length: int = 128

    @property
    def auto_class(self) -> type[Any]:
        return AutoModelForSequenceClassification

    def settings(self) -> dict[str, Any]:
        return {"task": self.name, "max_length": self.max_length}

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> Columns:
        encoded = tokenizer(rows["text"], truncation=True, max_length=self.max_length)
        ids = encoded["input_ids"]
        for text, tokens in zip(rows["text"], ids, strict=True):
            if not tokens:
                raise InputError(
                    f"the text {text!r} has no tokens for this model's tokenizer: leave it out"
                )
        return {
            "input_ids": ids,
            "attention_mask": encoded["attention_mask"],
            "labels": rows["label"],
        }

    def collate(
        self, tokenizer: PreTrainedTokenizerBase, multiple: int = 1
    ) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        return partial(batch_of_texts, Pad(pad_id(tokenizer), multiple))


def batch_of_texts(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], `labels` [B]."""
    labels = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
    return {**pad.inputs(rows), "labels": labels}
