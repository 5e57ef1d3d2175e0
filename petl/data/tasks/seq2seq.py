"""Sequence to sequence: an encoder-decoder model writes a target text for a text."""

from abc import ABC
from dataclasses import dataclass, replace
from operator import add
from typing import ClassVar

from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, BatchEncoding, PreTrainedTokenizerBase

from petl.data.tasks.base import (
    IGNORED,
    UNTRUNCATED,
    AutoModelClass,
    Batch,
    Columns,
    Outputs,
    P,
    Row,
    Task,
    TextWritingTask,
    WritingTask,
    source_numbers,
    summed_loss,
)
from petl.data.tasks.encoding_cache import sizes_of
from petl.system.values import field, integer


class TextPairTask(WritingTask[P], ABC):
    """An encoder reads a text, and a decoder writes another one."""

    peft_task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    # the model needs the labels, since they are also the decoder's inputs, shifted by one
    label_columns: ClassVar[tuple[str, ...]] = ()

    def labeled_tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of text and target; those of the target are labels."""
        ids, labels = row["input_ids"], row["labels"]
        # the decoder predicts all target tokens, the first included
        return [*ids, *labels], [False] * len(ids) + [True] * len(labels)

    def lengths(self, rows: Dataset) -> list[int]:
        """Number of tokens of text and target together."""
        return [*map(add, sizes_of(rows, "input_ids"), sizes_of(rows, "labels"))]

    def count(self, batch: Batch) -> int:
        """Number of tokens of texts and targets, without padding."""
        return super().count(batch) + self.items(batch)

    def positions(self, batch: Batch) -> int:
        """Number of tokens of texts and targets, with padding."""
        return super().positions(batch) + batch["labels"].numel()

    def items(self, batch: Batch) -> int:
        """Number of target tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Number of target tokens and their summed loss in nats of each row: [B, 2]."""
        labels = batch["labels"]
        # methods that prepend virtual tokens have more logits than labels
        return summed_loss(outputs.logits[:, -labels.shape[1] :], labels)


@dataclass
class Seq2Seq(TextPairTask[PreTrainedTokenizerBase], TextWritingTask):
    """Texts (`text`) with target texts (`target`)."""

    name: ClassVar[str] = "seq2seq"
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForSeq2SeqLM
    encoded_by: ClassVar[tuple[str, ...]] = ("max_length", "max_target_length", "prefix")
    prompt_columns: ClassVar[tuple[str, ...]] = ("input_ids",)

    max_length: int = field(512, integer(1))
    max_target_length: int = field(128, integer(1))  # tokens
    prefix: str = ""  # put before each text
    generate: int | None = field(None, integer(1))  # maximum new tokens of generated answers

    @property
    def longest(self) -> int:
        """The longest of text, target and generated answer."""
        return max(self.max_length, self.max_target_length, self.generate or 0)

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
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

    def texts(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> BatchEncoding:
        """Tokenize texts with `prefix`."""
        texts = [f"{self.prefix}{text}" for text in rows["text"]]
        return tokenizer(texts, truncation=True, max_length=self.max_length)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> list[list[int]]:
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
