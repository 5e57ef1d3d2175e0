"""Extractive question answering: the answer is a part of the context.

A context longer than a row is read in windows that overlap. Where a window does not hold the
answer, the model is to point at the row's first special token; so it is for questions that have no
answer. Scores are about texts: of all windows the best span is taken, its characters cut out of the
context, and compared with the right answers as SQuAD does. Shapes: B windows, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from petl.errors import InputError
from petl.tasks.base import Task, pad_id
from petl.tasks.metrics import best_of, squad_exact, squad_f1
from petl.tasks.rows import Columns, Pad, Row
from petl.tasks.token_classification import need_offsets

ROUNDED = 8  # to a multiple of so many tokens a batch may be filled up
CANDIDATES = 20  # starts and ends of a window that are looked at
LEAST = -1e9  # the logit of what cannot be chosen
OUTSIDE = (-1, -1)  # offsets of a token that is not of the context
POINTS = ("start_positions", "end_positions")

Span = tuple[float, str]  # how sure the model is, and the text


@dataclass
class QuestionAnswering(Task):
    """Questions (`question`, `number`) about a text (`context`).

    Right answers are `answers`, none where there is none, and begin at the characters `starts`.
    """

    name: ClassVar[str] = "question_answering"
    peft_task_type: ClassVar[str | None] = "QUESTION_ANS"
    metric: ClassVar[str] = "f1"
    higher_is_better: ClassVar[bool] = True
    truths: ClassVar[tuple[str, ...]] = POINTS
    by_row: ClassVar[bool] = True
    group: ClassVar[str | None] = "_number"

    max_length: int = 384
    stride: int = 128  # tokens of the context that a window shares with the one before
    max_answer_length: int = 30  # tokens
    unanswerable: bool = False  # whether some questions have no answer

    @property
    def auto_class(self) -> type[Any]:
        return AutoModelForQuestionAnswering

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 2}  # a start and an end

    def adjust(self, model: Any) -> None:
        model.register_forward_hook(without_padding, with_kwargs=True)

    def settings(self) -> dict[str, Any]:
        return {"task": self.name, "max_length": self.max_length, "stride": self.stride}

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns) -> Columns:
        need_offsets(tokenizer, self.name)
        self.check_room(tokenizer, rows["question"])
        encoded = tokenizer(
            rows["question"],
            rows["context"],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources = encoded["overflow_to_sample_mapping"]
        copied = ("input_ids", "attention_mask", "token_type_ids")
        columns: Columns = {key: encoded[key] for key in copied if key in encoded}
        columns["_offsets"] = [
            [
                tuple(span) if part == 1 else OUTSIDE
                for span, part in zip(spans, encoded.sequence_ids(i), strict=True)
            ]
            for i, spans in enumerate(encoded["offset_mapping"])
        ]
        columns["_null"] = [null_place(tokenizer, ids) for ids in columns["input_ids"]]
        points = [
            point(offsets, null, rows["starts"][row], rows["answers"][row])
            for offsets, null, row in zip(
                columns["_offsets"], columns["_null"], sources, strict=True
            )
        ]
        columns |= {key: [pair[i] for pair in points] for i, key in enumerate(POINTS)}
        for key in ("number", "context", "answers"):
            columns[f"_{key}"] = [rows[key][row] for row in sources]
        return columns

    def check_room(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> None:
        """Raise InputError if a question leaves too little of a row for the context."""
        special = tokenizer.num_special_tokens_to_add(pair=True)
        found = tokenizer(list(questions), add_special_tokens=False, verbose=False)["input_ids"]
        for question, ids in zip(questions, found, strict=True):
            room = self.max_length - special - len(ids)
            if room <= self.stride:
                raise InputError(
                    f"the question {question[:60]!r} leaves {max(0, room)} of data.max_length="
                    f"{self.max_length} tokens for the context, no more than data.stride="
                    f"{self.stride}: raise the one, lower the other, or leave the question out"
                )

    def whole(self) -> None:
        return None  # windows take in all of it

    def marks(self, row: Row) -> tuple[list[int], list[bool]]:
        first, last = (row[key] for key in POINTS)
        held = first != row["_null"]
        return row["input_ids"], [held and first <= i <= last for i in range(len(row["input_ids"]))]

    def truth(self, row: Row) -> str:
        return "no answer in this window" if row[POINTS[0]] == row["_null"] else ""

    def counts(self, rows: Dataset) -> dict[str, int]:
        pairs = zip(rows[POINTS[0]], rows["_null"], strict=True)
        lacking = sum(first == null for first, null in pairs)
        return {
            "windows with the answer": len(rows) - lacking,
            "windows without": lacking,
            "questions": len(set(rows["_number"])),
        }

    def collate(
        self, tokenizer: PreTrainedTokenizerBase, multiple: int = 1
    ) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        return partial(batch_of_windows, Pad(pad_id(tokenizer), multiple))

    def items(self, batch: dict[str, Tensor]) -> int:
        return batch["input_ids"].shape[0]

    def score(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Logits of starts, then of ends, then the loss in nats, of each window: [B, 2*T' + 1]."""
        width = -(-self.max_length // ROUNDED) * ROUNDED
        starts, ends = outputs.start_logits.float(), outputs.end_logits.float()
        loss = window_loss(starts, ends, batch, reduction="none")
        filled = [F.pad(logits, (0, width - logits.shape[1])) for logits in (starts, ends)]
        return torch.cat([*filled, loss[:, None]], 1)

    def summarize_rows(self, figures: Tensor, rows: Dataset) -> dict[str, float]:
        """Exact match and F1 of the answers' words, loss in nats a window, questions."""
        starts, ends, loss = np.split(figures.cpu().numpy(), [width(figures), -1], axis=1)
        best: dict[int, Span] = {}
        nulls: dict[int, float] = {}
        truths: dict[int, list[str]] = {}
        needed = rows.select_columns(["_number", "_context", "_answers", "_offsets", "_null"])
        for start, end, row in zip(starts, ends, needed, strict=True):
            number, null = row["_number"], row["_null"]
            truths[number] = row["_answers"]
            span = best_span(start, end, row["_offsets"], row["_context"], self.max_answer_length)
            best[number] = max(best.get(number, span), span)
            sure = float(start[null] + end[null])
            nulls[number] = min(nulls.get(number, sure), sure)
        exact = words = 0.0
        for number, (sure, text) in best.items():
            guess = "" if self.unanswerable and nulls[number] > sure else text
            exact += best_of(squad_exact, guess, truths[number])
            words += best_of(squad_f1, guess, truths[number])
        return {
            "exact_match": exact / len(best),
            "f1": words / len(best),
            "loss": float(loss.mean()),
            "rows": float(len(best)),
        }

    def head_loss(self, logits: Tensor, truths: dict[str, Tensor]) -> Tensor:
        return window_loss(logits[..., 0], logits[..., 1], truths)

    def head_logits(self, outputs: Any) -> Tensor:
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)

    def of_head(self, logits: Tensor) -> Any:
        return SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])


def width(figures: Tensor) -> int:
    """How many tokens `score` has logits of."""
    return (figures.shape[1] - 1) // 2


def window_loss(
    starts: Tensor, ends: Tensor, batch: Mapping[str, Any], reduction: str = "mean"
) -> Tensor:
    """The mean of the losses of start and end, which are choices among tokens, not padding."""
    padding = batch["attention_mask"] == 0
    losses = [
        F.cross_entropy(logits.float().masked_fill(padding, LEAST), batch[key], reduction=reduction)
        for logits, key in zip((starts, ends), POINTS, strict=True)
    ]
    return (losses[0] + losses[1]) / 2


def without_padding(model: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """A forward hook: the loss of transformers would let padding share in the choice, and so depend
    on which rows are in a batch.
    """
    if kwargs.get(POINTS[0]) is not None and kwargs.get("attention_mask") is not None:
        output["loss"] = window_loss(output.start_logits, output.end_logits, kwargs)
    return output


def null_place(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """The token of a window that stands for no answer: the classifier's, else the first."""
    cls = tokenizer.cls_token_id
    return ids.index(cls) if cls in ids else 0


def point(
    offsets: Sequence[tuple[int, int]], null: int, starts: Sequence[int], answers: Sequence[str]
) -> tuple[int, int]:
    """The first and last token of the first answer, or twice `null` if the window lacks it."""
    if not answers:
        return null, null
    start, end = starts[0], starts[0] + len(answers[0])
    inside = [i for i, span in enumerate(offsets) if span != OUTSIDE and span[0] < span[1]]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return null, null
    touched = [i for i in inside if offsets[i][0] < end and offsets[i][1] > start]
    return (touched[0], touched[-1]) if touched else (null, null)


def best_span(
    starts: np.ndarray, ends: np.ndarray, offsets: Sequence[Sequence[int]], context: str, most: int
) -> Span:
    """The likeliest span of up to `most` tokens of the context, as its sum of logits and text."""
    spans = np.asarray(offsets)
    inside = np.flatnonzero(spans[:, 0] < spans[:, 1])
    if not len(inside):
        return -np.inf, ""
    first = inside[np.argsort(-starts[inside], kind="stable")[:CANDIDATES]]
    last = inside[np.argsort(-ends[inside], kind="stable")[:CANDIDATES]]
    length = last[None] - first[:, None] + 1
    sums = np.where((length > 0) & (length <= most), starts[first][:, None] + ends[last], -np.inf)
    i, j = np.unravel_index(sums.argmax(), sums.shape)
    if not np.isfinite(sums[i, j]):
        return -np.inf, ""
    return float(sums[i, j]), context[spans[first[i], 0] : spans[last[j], 1]]


def batch_of_windows(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, perhaps `token_type_ids` [B, T]; first and last token [B]."""
    points = {key: torch.tensor([row[key] for row in rows]) for key in POINTS}
    return {**pad.inputs(rows), **points}
