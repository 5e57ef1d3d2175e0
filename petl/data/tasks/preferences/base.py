"""What tasks on preferences share: encoded answers, their log-probabilities, and scores by name.

Shapes: N texts, T tokens, V entries of the vocabulary, P pairs, S scores.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from petl.core.model.modes import evaluation_mode, without_adapters
from petl.data.formats import shared_length
from petl.data.objectives import Objective
from petl.data.tasks import Message
from petl.data.tasks.base import (
    IGNORED,
    AutoModelClass,
    Batch,
    Collate,
    Columns,
    Outputs,
    Pad,
    Prediction,
    Row,
    Task,
    TextWritingTask,
    batch_of_tokens,
    pad_id,
    rounded,
    source_numbers,
    sums_dtype,
)
from petl.data.tasks.causal_lm import DecoderTask, end_text, has_targets
from petl.data.tasks.chat import encode_chat, question
from petl.data.tasks.own_loss import compute_loss_of
from petl.system.values import field, integer

Text = str | list[Message]  # with `plain`, or turns of a conversation
Encoded = tuple[list[int], list[int]]  # tokens and labels


class LabelledOutputs(NamedTuple):
    """Logits of a batch, and its labels with what `Task.completed` has added."""

    logits: Tensor
    labels: Batch


@dataclass
class PreferenceTask(Objective, Task[PreTrainedTokenizerBase], ABC):
    """Texts whose loss is computed from scores of each pair, or of each text.

    Attributes:
        scored: names of the columns of `values`, of which the first is the loss.
        last: means of the others in the last micro-batch of training, [S - 1].
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    encoded_by: ClassVar[tuple[str, ...]] = ("max_length", "plain")
    sums_predictions: ClassVar[bool] = False
    tensors_by_row: ClassVar[bool] = False
    scored: ClassVar[tuple[str, ...]]

    max_length: int = field(512, integer(1))

    def __post_init__(self) -> None:
        self.last: Tensor | None = None

    @property
    def chat(self) -> bool:
        """True if prompts and answers are turns of a conversation."""
        return not self.plain

    def adjust(self, model: PreTrainedModel) -> None:
        """Let the model compute the loss of this task."""
        compute_loss_of(self, model)

    def why_dropped(self) -> str:
        return f": an answer begins behind data.max_length={self.max_length} tokens"

    @abstractmethod
    def values(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The columns `scored` of each pair or text, [P, S] or [N, S].

        Args:
            labels: the `label_columns` of the batch.
        """

    def own_loss(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The mean loss of the pairs or texts of a batch, 0-d."""
        values = self.values(outputs, labels)
        self.last = values[:, 1:].detach().mean(0)
        return values[:, 0].mean()

    def metrics(self) -> dict[str, float]:
        """The scores of the last micro-batch of training."""
        if self.last is None:
            return {}
        return dict(zip(self.scored[1:], self.last.tolist(), strict=True))

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """The model's logits, and what `completed` adds to the labels of the batch."""
        batch = self.completed(model, batch)
        labels = {name: batch[name] for name in self.label_columns if name in batch}
        logits = super().outputs(model, batch).logits
        return cast("Outputs", LabelledOutputs(logits, labels))

    def scores(self, outputs: Outputs) -> Tensor:
        """`values` of what `outputs` has returned."""
        assert isinstance(outputs, LabelledOutputs)
        return self.values(outputs, outputs.labels)

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The columns `scored` of each pair or text, [P, S] or [N, S]."""
        return self.scores(outputs).float()

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Number of pairs or texts, then the sums of the columns `scored`: [1 + S]."""
        values = self.scores(outputs)
        sums = values.to(sums_dtype(values.device)).sum(0)
        return torch.cat([sums.new_tensor([len(values)]), sums])

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Means of the columns `scored`, and the number of pairs or texts."""
        rows, *sums = total.tolist()
        return {**{n: v / rows for n, v in zip(self.scored, sums, strict=True)}, "rows": rows}

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The columns `scored` of each row."""
        for value, row in zip(values, rows, strict=True):
            yield row["_number"], dict(zip(self.scored, map(rounded, value), strict=True))


@dataclass
class AnswerTask(PreferenceTask, DecoderTask[PreTrainedTokenizerBase], TextWritingTask, ABC):
    """A decoder that learns from the probabilities of its answers, compared with the base model.

    Attributes:
        has_reference: True if the loss needs the log-probabilities of the base model.
    """

    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForCausalLM
    label_columns: ClassVar[tuple[str, ...]] = ("labels", "reference")
    has_reference: ClassVar[bool] = True

    @property
    def used_as(self) -> str:
        """As one that was trained on conversations, or on texts."""
        return "chat" if self.chat else "causal_lm"

    def completed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with `reference`: the base model's log-probability of each answer, [N]."""
        if not self.has_reference:
            return batch
        # without dropout, which would make another reference in each step
        with torch.no_grad(), evaluation_mode(model), without_adapters(model):
            return {**batch, "reference": self.answers(model, batch)}

    def answers(self, model: nn.Module, batch: Batch, prefix: str = "") -> Tensor:
        """A model's log-probability of the answer in each text, [N].

        Args:
            prefix: of the columns of the batch.
        """
        inputs = {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask")}
        return log_probabilities(model(**inputs).logits, batch[f"{prefix}labels"])[0]

    def ratios(self, outputs: Outputs, labels: Batch) -> tuple[Tensor, Tensor]:
        """The log-ratio of each answer to the base model, and its number of tokens, [N] each.

        Without `reference`, the model is the base: the ratios are 0, and have a gradient.
        """
        own, tokens = log_probabilities(outputs.logits, labels["labels"])
        reference = labels.get("reference")
        return own - (own.detach() if reference is None else reference), tokens

    def prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> list[list[int]]:
        """The tokens of each prompt, which the model answers."""
        if self.plain:
            return tokenizer(rows["prompt"], verbose=False)["input_ids"]
        return [question(tokenizer, chat) for chat in rows["prompt"]]


def log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of each row's labels, and their number: [N] each.

    Args:
        logits, labels: as of `token_log_probabilities`.
    """
    found = token_log_probabilities(logits, labels)
    return found.sum(1), (labels[:, 1:] != IGNORED).sum(1)


def token_log_probabilities(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of each label but the first, [N, T - 1]; 0 where it is ignored.

    Args:
        logits: [N, T, V], or more positions at the beginning (virtual tokens).
        labels: that each position is, [N, T], or IGNORED.
        temperature: of the softmax.
    """
    logits, labels = logits[:, -labels.shape[1] : -1].float(), labels[:, 1:]
    if temperature != 1:
        logits = logits / temperature
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view(labels.shape)


class PairTask(PreferenceTask, ABC):
    """Rows are pairs: `prompt`, and the answers `chosen` and `rejected` to it.

    A batch has the chosen texts of all pairs, then the rejected ones.
    """

    shown: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Encode both texts of each pair; pairs without a token of an answer are dropped."""
        both = zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True)
        pairs = [
            self.shortened(encoded(tokenizer, prompt, answers, plain=self.plain))
            for prompt, *answers in both
        ]
        kept = {i: pair for i, pair in enumerate(pairs) if self.usable(pair)}
        chosen, rejected = ([pair[side] for pair in kept.values()] for side in (0, 1))
        return {
            "input_ids": [ids for ids, _ in chosen],
            "labels": [labels for _, labels in chosen],
            "rejected_ids": [ids for ids, _ in rejected],
            "rejected_labels": [labels for _, labels in rejected],
            **source_numbers(rows, kept),
        }

    def shortened(self, texts: Sequence[Encoded]) -> list[Encoded]:
        """Texts cut to `max_length` tokens."""
        return [(ids[: self.max_length], labels[: self.max_length]) for ids, labels in texts]

    def usable(self, pair: Sequence[Encoded]) -> bool:
        """True if both texts of a pair have a token of an answer."""
        return all(has_targets(labels) for _, labels in pair)

    def is_truncated(self, row: Row) -> bool:
        return max(len(row["input_ids"]), len(row["rejected_ids"])) > self.max_length

    def labeled_texts(self, row: Row) -> dict[str, tuple[list[int], list[bool]]]:
        """Both texts of a pair."""
        other = text_of(row["rejected_ids"], row["rejected_labels"])
        return {"chosen": self.labeled_tokens(row), "rejected": self.labeled_tokens(other)}

    def lengths(self, rows: Iterable[Row]) -> list[int]:
        """The tokens of both texts of each pair."""
        columns = zip(rows["input_ids"], rows["rejected_ids"], strict=True)  # ty: ignore
        return [len(chosen) + len(rejected) for chosen, rejected in columns]

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads the chosen texts and the rejected ones to one length."""
        return partial(batch_of_pairs, Pad(pad_id(tokenizer), multiple))

    def items(self, batch: Batch) -> int:
        """Number of pairs."""
        return len(batch["input_ids"]) // 2


def batch_of_pairs(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, [2 P, T] each: first all chosen texts."""
    chosen = [text_of(row["input_ids"], row["labels"]) for row in rows]
    rejected = [text_of(row["rejected_ids"], row["rejected_labels"]) for row in rows]
    return batch_of_tokens(pad, [*chosen, *rejected])


def text_of(ids: list[int], labels: list[int]) -> Row:
    """An encoded text as `batch_of_tokens` takes it."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encoded(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, answers: Sequence[Text], *, plain: bool
) -> list[Encoded]:
    """Tokens of a prompt with each of its answers, and labels, which only the answer has.

    Args:
        plain: tokenize the texts as they are, with the end token; an answer begins where the
            tokens of the prompt and of all texts part.
    """
    if not plain:
        return [encode_chat(tokenizer, [*prompt, *answer]) for answer in answers]  # ty: ignore
    # together with the prompt: tokens may merge where the answer begins
    asked, *texts = tokenizer([prompt, *(f"{prompt}{each}" for each in answers)], verbose=False)[
        "input_ids"
    ]
    start = shared_length([asked, *texts])
    ended = [end_text(text, tokenizer.eos_token_id) for text in texts]
    return [(ids, [IGNORED] * start + ids[start:]) for ids in ended]
