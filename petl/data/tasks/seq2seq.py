"""Sequence to sequence: an encoder-decoder model writes a target text for a text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from petl.data.tasks.base import (
    IGNORED,
    UNTRUNCATED,
    Columns,
    Pad,
    Prediction,
    Row,
    Task,
    batch_of_tokens,
    mean_losses,
    pad_id,
    perplexity,
    source_numbers,
    summed_loss,
)
from petl.system.values import field, integer


@dataclass
class Seq2Seq(Task):
    """Texts (`text`) with target texts (`target`)."""

    name: ClassVar[str] = "seq2seq"
    peft_task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    new_head: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    sums_predictions: ClassVar[bool] = True
    label_columns: ClassVar[
        tuple[str, ...]
    ] = ()  # the model needs the labels, since they are also the decoder's inputs, shifted by one

    max_length: int = field(512, integer(1))
    max_target_length: int = field(128, integer(1))  # tokens
    prefix: str = ""  # put before each text
    generate: int | None = field(None, integer(1))  # maximum new tokens of generated answers

    @property
    def auto_class(self) -> type[Any]:
        return AutoModelForSeq2SeqLM

    @property
    def longest(self) -> int:
        """The longest of text, target and generated answer."""
        return max(self.max_length, self.max_target_length, self.generate or 0)

    def settings(self) -> dict[str, Any]:
        lengths = {"max_length": self.max_length, "max_target_length": self.max_target_length}
        return {"task": self.name, **lengths, "prefix": self.prefix}

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> Columns:
        """Tokenize texts with `prefix`, and targets; labels are the target tokens."""
        inputs = self.texts(tokenizer, rows)
        targets = tokenizer(
            text_target=rows["target"], truncation=True, max_length=self.max_target_length
        )["input_ids"]
        # an empty text or target gives no attention or no loss
        kept = [i for i, ids in enumerate(inputs["input_ids"]) if ids and targets[i]]
        return {
            "input_ids": [inputs["input_ids"][i] for i in kept],
            "attention_mask": [inputs["attention_mask"][i] for i in kept],
            "labels": [targets[i] for i in kept],
            "_answer": [rows["target"][i] for i in kept],
            **source_numbers(rows, kept),
        }

    def texts(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> Any:
        """Tokenize texts with `prefix`."""
        texts = [f"{self.prefix}{text}" for text in rows["text"]]
        return tokenizer(texts, truncation=True, max_length=self.max_length)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> list[list[int]]:
        """The tokens of each text, which the model reads to write an answer."""
        return self.texts(tokenizer, rows)["input_ids"]

    def why_dropped(self) -> str:
        """Rows without tokens are dropped."""
        return ": a text or its target has no tokens"

    def untruncated(self) -> Task:
        """A copy that truncates neither texts nor targets."""
        return replace(self, max_length=UNTRUNCATED, max_target_length=UNTRUNCATED)

    def is_truncated(self, row: Row) -> bool:
        """True if the text or the target is longer than this task allows."""
        return super().is_truncated(row) or len(row["labels"]) > self.max_target_length

    def labeled_tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of text and target; those of the target are labels."""
        ids, labels = row["input_ids"], row["labels"]
        # the decoder predicts all target tokens, the first included
        return [*ids, *labels], [False] * len(ids) + [True] * len(labels)

    def lengths(self, rows: Dataset) -> list[int]:
        """Number of tokens of text and target together."""
        pairs = zip(rows["input_ids"], rows["labels"], strict=True)
        return [len(ids) + len(labels) for ids, labels in pairs]

    def count(self, batch: dict[str, Tensor]) -> int:
        """Number of tokens of texts and targets, without padding."""
        return super().count(batch) + self.items(batch)

    def positions(self, batch: dict[str, Tensor]) -> int:
        """Number of tokens of texts and targets, with padding."""
        return super().positions(batch) + batch["labels"].numel()

    def collate(
        self, tokenizer: PreTrainedTokenizerBase, multiple: int = 1
    ) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        """A collate function that pads texts and targets."""
        return partial(batch_of_tokens, Pad(pad_id(tokenizer), multiple))

    def items(self, batch: dict[str, Tensor]) -> int:
        """Number of target tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def score(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Number of target tokens, then their summed loss in nats: [2]."""
        return self.predict(outputs, batch).sum(0)

    def predict(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Number of target tokens and their summed loss in nats of each row: [B, 2]."""
        labels = batch["labels"]
        # methods that prepend virtual tokens have more logits than labels
        return summed_loss(outputs.logits[:, -labels.shape[1] :], labels)

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The loss of each row."""
        return mean_losses(values, rows)

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Loss in nats per token, perplexity, and number of tokens."""
        return perplexity(total)
