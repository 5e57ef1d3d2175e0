"""Reward models: a classifier with one output, which is higher for the chosen text of a pair.

Bradley and Terry 1952, as in Ouyang et al. 2022, "Training language models to follow instructions
with human feedback", arXiv:2203.02155.

Shapes: P pairs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from petl.data.objectives import RewardSettings
from petl.data.tasks.base import (
    AutoModelClass,
    Batch,
    Collate,
    Columns,
    Fields,
    Outputs,
    Pad,
    Prediction,
    Row,
    pad_id,
    rounded,
)
from petl.data.tasks.preferences.base import Encoded, PairTask, batch_of_pairs, encoded
from petl.data.tasks.preferences.pairs import SCORED, of_pairs


@dataclass
class Reward(RewardSettings, PairTask):
    """Pairs of texts, of which longer ones than `max_length` are left out, not cut."""

    name: ClassVar[str] = "reward"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForSequenceClassification
    scored: ClassVar[tuple[str, ...]] = SCORED

    def model_kwargs(self) -> Fields:
        """One output without class names."""
        names = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
        return {"num_labels": 1, "problem_type": "regression", **names}

    @property
    def used_as(self) -> str:
        """As a regression, if texts have no template."""
        return "regression" if self.plain else self.name

    def why_dropped(self) -> str:
        return f": a text has more than data.max_length={self.max_length} tokens"

    def untruncated(self) -> None:
        """None: no row is truncated."""

    def shortened(self, texts: Sequence[Encoded]) -> list[Encoded]:
        """The texts as they are: the reward is read at the end."""
        return [*texts]

    def usable(self, pair: Sequence[Encoded]) -> bool:
        """True if no text of a pair is too long."""
        return all(0 < len(ids) <= self.max_length for ids, _ in pair)

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Encode both texts of each pair, or prompt and completion of a row to predict."""
        if "chosen" in rows:
            return super().encode_rows(tokenizer, rows)
        both = zip(rows["prompt"], rows["completion"], strict=True)
        texts = [encoded(tokenizer, *row[:1], row[1:], plain=self.plain)[0][0] for row in both]
        cut = [ids[: self.max_length] for ids in texts]
        return {"input_ids": cut, "attention_mask": [[1] * len(ids) for ids in cut]}

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads the texts; `labels` are 1 for chosen ones, else 0."""
        return partial(batch_of_scored, Pad(pad_id(tokenizer), multiple))

    def values(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The columns `SCORED`."""
        rewards = outputs.logits.squeeze(-1).float()
        chosen, rejected = rewards.chunk(2)
        losses = -F.logsigmoid(chosen - rejected)
        if self.center is not None:
            losses = losses + self.center * (chosen + rejected) ** 2
        return of_pairs(losses, rewards)

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The columns `SCORED` of each pair, [P, 5], or the reward of each text, [N, 1]."""
        return super().predict(outputs, batch) if "labels" in batch else outputs.logits.float()

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The columns `SCORED` of each pair, or the reward of each text as its prediction."""
        for value, row in zip(values, rows, strict=True):
            names = self.scored if len(value) > 1 else ("prediction",)
            yield row["_number"], dict(zip(names, map(rounded, value), strict=True))


def batch_of_scored(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The texts of pairs with `labels`, [2 P], or of rows to predict without."""
    if "rejected_ids" not in rows[0]:
        return pad.inputs(rows)
    batch = batch_of_pairs(pad, rows)
    return {**batch, "labels": torch.tensor([1.0] * len(rows) + [0.0] * len(rows))}
