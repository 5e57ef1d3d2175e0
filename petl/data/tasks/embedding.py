"""Embedding: texts through a model without head. For export; petl has no loss that trains it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import AutoModel

from petl.data.tasks.base import AutoModelClass, Batch, Outputs, TextTask
from petl.system.values import field, integer


@dataclass
class Embedding(TextTask):
    """Texts without labels, for adapters that were trained elsewhere (sentence-transformers)."""

    name: ClassVar[str] = "embedding"
    peft_task_type: ClassVar[str | None] = "FEATURE_EXTRACTION"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    new_head: ClassVar[bool] = False
    auto_class: ClassVar[type[AutoModelClass]] = AutoModel

    max_length: int = field(128, integer(1))

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Not possible: the rows have no labels."""
        raise NotImplementedError("embeddings have no labels to score")
