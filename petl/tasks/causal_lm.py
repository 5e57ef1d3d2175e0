"""Causal language modelling: plain text, or chat with the loss on the assistant's turns."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from petl.tasks.base import Task, batch_of_tokens, pad_id, perplexity, summed_loss
from petl.tasks.chat import Message, encode_chat, last_answer
from petl.tasks.packing import batch_of_blocks, keep_texts_apart, pack
from petl.tasks.rows import IGNORED, Columns, Pad, Row


@dataclass
class CausalLM(Task):
    """Texts (`text`), or conversations (`messages`: lists of role and content)."""

    name: ClassVar[str] = "causal_lm"
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    new_head: ClassVar[bool] = False

    max_length: int = 512
    chat: bool = False
    pack: bool = False  # several texts a row, none of which sees another; else one row a text
    generate: int | None = None  # of chat: most tokens of an answer that scores are about

    @property
    def packs(self) -> bool:
        return self.pack

    @property
    def auto_class(self) -> type[Any]:
        return AutoModelForCausalLM

    def settings(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "max_length": self.max_length,
            "chat": self.chat,
            "pack": self.pack,
            **({"answers": True} if self.generate else {}),
        }

    @property
    def longest(self) -> int:
        return self.max_length + (self.generate or 0)

    def adjust(self, model: Any) -> None:
        if self.pack:
            keep_texts_apart(model)

    def why_dropped(self) -> str:
        if self.chat:
            return f": no assistant turn within the first max_length={self.max_length} tokens"
        return ": fewer than two tokens"

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> Columns:
        if self.chat:
            return self.conversations(tokenizer, rows["messages"])
        # verbose=False: a whole book is longer than the model reads at once, and is cut below
        encoded = tokenizer(rows["text"], verbose=False)["input_ids"]
        texts = [end_text(ids, tokenizer.eos_token_id) for ids in encoded]
        if self.pack:
            return self.blocks(ids for ids, text in zip(texts, rows["text"], strict=True) if text)
        return columns((ids[: self.max_length], ids[: self.max_length]) for ids in texts)

    def conversations(
        self, tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[Message]]
    ) -> Columns:
        """Chats as columns; with `generate` also how the last answer is asked for, and its text."""
        made = (encode_chat(tokenizer, chat) for chat in chats)
        cut = [(ids[: self.max_length], labels[: self.max_length]) for ids, labels in made]
        found = columns(cut)
        if self.generate is None:
            return found
        kept = [chat for chat, (_, labels) in zip(chats, cut, strict=True) if is_learned(labels)]
        asked = [last_answer(tokenizer, chat) for chat in kept]
        return {
            **found,
            "_prompt": [prompt for prompt, _ in asked],
            "_answer": [answer for _, answer in asked],
        }

    def whole(self) -> Task | None:
        return None if self.pack else super().whole()

    def marks(self, row: Row) -> tuple[list[int], list[bool]]:
        later = [label != IGNORED for label in row["labels"][1:]]  # nothing tells the first token
        return row["input_ids"], [False, *later]

    def blocks(self, texts: Iterable[list[int]]) -> Columns:
        """Packed texts as columns, with each token's position in its text."""
        blocks = [block for block in pack(texts, self.max_length) if is_learned(block.labels)]
        positions = [block.positions for block in blocks]
        pairs = ((block.ids, block.labels) for block in blocks)
        return {**columns(pairs), "position_ids": positions}

    def collate(
        self, tokenizer: PreTrainedTokenizerBase, multiple: int = 1
    ) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        make = batch_of_blocks if self.pack else batch_of_tokens
        return partial(make, Pad(pad_id(tokenizer), multiple))

    def items(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def score(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Predicted tokens, then their summed loss in nats: [2]."""
        # methods that put virtual tokens in front have more logits than labels
        logits = outputs.logits[:, -batch["labels"].shape[1] : -1]
        return summed_loss(logits, batch["labels"][:, 1:])

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Loss in nats a token, its perplexity, and the number of tokens predicted."""
        return perplexity(total)


def end_text(ids: list[int], eos: int | None) -> list[int]:
    """A text's tokens with the end token behind them, once."""
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def is_learned(labels: list[int]) -> bool:
    """Whether a row has a token to predict."""
    return any(label != IGNORED for label in labels[1:])


def columns(rows: Iterable[tuple[list[int], list[int]]]) -> Columns:
    """Token ids and labels as columns; rows without a token to predict are left out."""
    kept = [(ids, labels) for ids, labels in rows if is_learned(labels)]
    return {
        "input_ids": [ids for ids, _ in kept],
        "attention_mask": [[1] * len(ids) for ids, _ in kept],
        "labels": [labels for _, labels in kept],
    }
