"""Causal language modeling: plain text, or chat with the loss on the assistant's turns."""

from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from petl.core.types import base_of
from petl.data.tasks import Message
from petl.data.tasks.base import (
    IGNORED,
    AutoModelClass,
    Batch,
    Collate,
    Columns,
    Fields,
    Outputs,
    P,
    Pad,
    Row,
    Task,
    TextWritingTask,
    WritingTask,
    pad_id,
    source_numbers,
    summed_loss,
    summed_loss_at,
)
from petl.data.tasks.chat import encode_chat, last_answer, question
from petl.data.tasks.packing import (
    batch_of_blocks,
    check_packed_texts_isolated,
    isolate_packed_texts,
    pack,
)
from petl.ops.segmented_loss import shifted
from petl.system.values import field, integer


class DecoderTask(WritingTask[P], ABC):
    """A decoder writes: each token is predicted from those before it, where it has a label."""

    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"

    def labeled_tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of a row, and for each whether the model predicts it."""
        later = [label != IGNORED for label in row["labels"][1:]]
        return row["input_ids"], [False, *later]  # the first token is never predicted

    def items(self, batch: Batch) -> int:
        """Number of predicted tokens."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """As of any task; with `train.skip_unread`, logits of predicted tokens alone."""
        # of a model of petl.efficiency.skip_unread.labelled_positions; a PeftModel passes the name
        # on to it
        logits_at = getattr(model, "logits_at", None)
        if logits_at is None:
            return super().outputs(model, batch)
        with logits_at(batch["labels"]) as wanted:
            outputs = super().outputs(model, batch)
        if wanted is None:
            return outputs
        return cast("Outputs", LabelledText(outputs.logits[0], wanted))

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Number of predicted tokens and their summed loss in nats of each row: [B, 2]."""
        if isinstance(outputs, LabelledText):
            return summed_loss_at(outputs.wanted, outputs.logits, shifted(batch["labels"]))
        # methods that prepend virtual tokens have more logits than labels
        logits = outputs.logits[:, -batch["labels"].shape[1] : -1]
        return summed_loss(logits, batch["labels"][:, 1:])


@dataclass
class CausalLM(DecoderTask[PreTrainedTokenizerBase], TextWritingTask):
    """Texts (`text`), or conversations (`messages`: lists of role and content)."""

    name: ClassVar[str] = "causal_lm"
    loss_unit: ClassVar[str] = " (nats per token)"
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForCausalLM
    encoded_by: ClassVar[tuple[str, ...]] = ("max_length", "chat", "pack")
    shown: ClassVar[tuple[str, ...]] = ("text", "messages")

    max_length: int = field(512, integer(1))
    chat: bool = False
    pack: bool = (
        False  # several texts in a row, without attention between them; else one text per row
    )
    # chat only: maximum new tokens of generated answers
    generate: int | None = field(None, integer(1))

    @property
    def used_as(self) -> str:
        """`chat` for conversations."""
        return "chat" if self.chat else self.name

    @property
    def packs(self) -> bool:
        """True with `pack`."""
        return self.pack

    def settings(self) -> Fields:
        # absent without `generate`, which then does not change encoded rows
        return {**super().settings(), **({"answers": True} if self.generate else {})}

    @property
    def longest(self) -> int:
        """`max_length`, and the generated tokens after it."""
        return self.max_length + (self.generate or 0)

    def adjust(self, model: PreTrainedModel) -> None:
        """Isolate packed texts in attention."""
        if self.pack:
            isolate_packed_texts(model)

    def check_model(self, model: PeftModel) -> None:
        """Check that packed texts do not depend on one another."""
        if self.pack:
            check_packed_texts_isolated(model, base_of(model))

    def why_dropped(self) -> str:
        if self.chat:
            return f": no assistant turn within the first max_length={self.max_length} tokens"
        return ": fewer than two tokens"

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Tokenize texts, with `pack` as blocks, or chats; labels are input tokens or IGNORED."""
        if self.chat:
            return self.conversations(tokenizer, rows)
        # verbose=False: no warning about texts longer than the model's context; they are cut below
        ended = [up_to_end(text, tokenizer.eos_token) for text in rows["text"]]
        encoded = tokenizer(ended, verbose=False)["input_ids"]
        texts = [end_text(ids, tokenizer.eos_token_id) for ids in encoded]
        if self.pack:
            return self.blocks(ids for ids, text in zip(texts, rows["text"], strict=True) if text)
        return columns(((ids[: self.max_length], ids[: self.max_length]) for ids in texts), rows)

    def conversations(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> Columns:
        """Encode chats; with `generate` also the prompt of the last answer, and its text."""
        chats: list[list[Message]] = rows["messages"]
        encoded = (encode_chat(tokenizer, chat) for chat in chats)
        # a row without answer tokens within max_length is dropped below
        truncated = [(ids[: self.max_length], labels[: self.max_length]) for ids, labels in encoded]
        inputs = columns(truncated, rows)
        if self.generate is None:
            return inputs
        # the same rows as in `columns`
        kept = [
            chat for chat, (_, labels) in zip(chats, truncated, strict=True) if has_targets(labels)
        ]
        questions = [last_answer(tokenizer, chat) for chat in kept]
        return {
            **inputs,
            "_prompt": [prompt for prompt, _ in questions],
            "_answer": [answer for _, answer in questions],
        }

    def untruncated(self) -> Task | None:
        """A copy that truncates no row; None with `pack`, whose blocks contain all tokens."""
        return None if self.pack else super().untruncated()

    def blocks(self, texts: Iterable[list[int]]) -> Columns:
        """Pack texts into blocks, with each token's position in its text."""
        # a block with one token only has nothing to predict
        blocks = [block for block in pack(texts, self.max_length) if has_targets(block.labels)]
        # transformers recognizes packed texts by them, see packing.py
        positions = [block.positions for block in blocks]
        pairs = ((block.ids, block.labels) for block in blocks)
        return {**columns(pairs, {}), "position_ids": positions}

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads rows, or packed blocks with their positions."""
        if self.pack:
            return partial(batch_of_blocks, Pad(pad_id(tokenizer), multiple))
        return super().collate(tokenizer, multiple)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> list[list[int]]:
        """The tokens of each conversation or text, which the model continues."""
        if self.chat:
            return [question(tokenizer, chat) for chat in rows["messages"]]
        return tokenizer(rows["text"], verbose=False)["input_ids"]


class LabelledText(NamedTuple):
    """Logits of the positions that predict a token with a label.

    Attributes:
        logits: [N, V].
        wanted: the positions, [B, T] bool, N in all.
    """

    logits: Tensor
    wanted: Tensor


def end_text(ids: list[int], eos: int | None) -> list[int]:
    """Append the end token unless the tokens end with it."""
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def up_to_end(text: str, end: str | None) -> str:
    """A text without space after its end token, as chat templates write it."""
    stripped = text.rstrip()
    return stripped if end and stripped.endswith(end) else text


def has_targets(labels: list[int]) -> bool:
    """True if a row has a token to predict; the first token has no prediction."""
    return any(label != IGNORED for label in labels[1:])


def columns(pairs: Iterable[tuple[list[int], list[int]]], rows: Columns) -> Columns:
    """Token ids and labels as columns; rows without a token to predict are dropped.

    Args:
        rows: of which they are made, one each; empty if their texts are joined.
    """
    kept = {i: pair for i, pair in enumerate(pairs) if has_targets(pair[1])}
    return {
        "input_ids": [ids for ids, _ in kept.values()],
        "attention_mask": [[1] * len(ids) for ids, _ in kept.values()],
        "labels": [labels for _, labels in kept.values()],
        **source_numbers(rows, kept),
    }
