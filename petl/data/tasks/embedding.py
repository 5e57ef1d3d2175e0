"""Embedding: texts through a model without head. For export; petl has no loss that trains it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModel

from petl.data.tasks.base import TextTask
from petl.system.values import field, integer


@dataclass
class Embedding(TextTask):
    """Texts without labels, for adapters that were trained elsewhere (sentence-transformers)."""

    name: ClassVar[str] = "embedding"
    peft_task_type: ClassVar[str | None] = "FEATURE_EXTRACTION"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    new_head: ClassVar[bool] = False

    max_length: int = field(128, integer(1))

    @property
    def auto_class(self) -> type[Any]:
        return AutoModel

    def items(self, batch: dict[str, Tensor]) -> int:
        """Number of rows."""
        return len(batch["input_ids"])

    def score(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Not possible: the rows have no labels."""
        raise NotImplementedError("embeddings have no labels to score")
