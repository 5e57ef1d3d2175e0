"""Extractive question answering: the answer is a span of the context.

A context longer than a row is split into overlapping windows. If a window does not contain the
answer, or the question has none, the label is the row's first special token (the null position).
Scores are on texts: the best span of all windows is extracted from the context and compared with
the right answers as in SQuAD. Shapes: B windows, T tokens.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

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
    Task,
    need_offsets,
    pad_id,
    rounded,
)
from petl.data.tasks.metrics import best_of, squad_exact, squad_f1
from petl.errors import InputError
from petl.system.values import field, integer

MAX_MULTIPLE = 8  # the largest `multiple` of `collate`: batches may be padded up to it
CANDIDATES = 20  # best starts and ends of a window that are combined
T = TypeVar("T", bound=ModelOutput)
MASKED_LOGIT = -1e9  # the logit of padding
OUTSIDE = (-1, -1)  # offsets of a token that is not part of the context
POINTS = ("start_positions", "end_positions")


class Span(NamedTuple):
    """A possible answer.

    Attributes:
        logit: sum of the logits of start and end.
        start: position of the first character in the context; None without an answer.
        probability: product of the probabilities of start and end in the window.
    """

    logit: float
    text: str
    start: int | None
    probability: float


NO_SPAN = Span(-np.inf, "", None, 0.0)


@dataclass
class QuestionAnswering(Task[PreTrainedTokenizerBase]):
    """Questions (`question`, `number`) about a text (`context`).

    `answers` lists the right answers, none if there is none, and `starts` their first characters.
    """

    name: ClassVar[str] = "question_answering"
    peft_task_type: ClassVar[str | None] = "QUESTION_ANS"
    metric: ClassVar[str] = "f1"
    higher_is_better: ClassVar[bool] = True
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForQuestionAnswering
    encoded_by: ClassVar[tuple[str, ...]] = ("max_length", "stride")
    label_columns: ClassVar[tuple[str, ...]] = POINTS
    by_row: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("question", "context")
    group: ClassVar[str | None] = "_number"

    max_length: int = field(384, integer(1))
    stride: int = field(128, integer(0))  # tokens by which consecutive windows overlap
    max_answer_length: int = field(30, integer(1))  # tokens
    unanswerable: bool = False  # some questions have no answer

    def model_kwargs(self) -> Fields:
        return {"num_labels": 2}  # a start and an end

    def adjust(self, model: PreTrainedModel) -> None:
        """Exclude padding from the model's own loss."""
        model.register_forward_hook(without_padding, with_kwargs=True)

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Split contexts into windows; `number` keeps the windows of a question together.

        Raises:
            InputError: a question leaves no room for the context, or the tokenizer has no offsets.
        """
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
        sources = encoded["overflow_to_sample_mapping"]  # the row of each window
        copied = ("input_ids", "attention_mask", "token_type_ids")
        columns: Columns = {key: encoded[key] for key in copied if key in encoded}
        columns["_offsets"] = [
            [
                # sequence 1 is the context; special tokens have None
                tuple(span) if part == 1 else OUTSIDE
                for span, part in zip(spans, encoded.sequence_ids(i), strict=True)
            ]
            for i, spans in enumerate(encoded["offset_mapping"])
        ]
        columns["_null"] = [null_place(tokenizer, ids) for ids in columns["input_ids"]]
        if "answers" in rows:
            points = [
                point(offsets, null, rows["starts"][row], rows["answers"][row])
                for offsets, null, row in zip(
                    columns["_offsets"], columns["_null"], sources, strict=True
                )
            ]
            columns |= {key: [pair[i] for pair in points] for i, key in enumerate(POINTS)}
        for key in ("number", "context"):
            if key in rows:
                columns[f"_{key}"] = [rows[key][row] for row in sources]
        if "answers" in rows:
            # as text: of lists the first rows decide the type, and all of these may be empty
            columns["_answers"] = [json.dumps(rows["answers"][row]) for row in sources]
        return columns

    def check_room(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> None:
        """Raise InputError if a question leaves too few tokens of a row for the context."""
        special = tokenizer.num_special_tokens_to_add(pair=True)
        encoded = tokenizer(list(questions), add_special_tokens=False, verbose=False)["input_ids"]
        for question, ids in zip(questions, encoded, strict=True):
            room = self.max_length - special - len(ids)
            if room <= self.stride:
                raise InputError(
                    f"the question {question[:60]!r} leaves {max(0, room)} of data.max_length="
                    f"{self.max_length} tokens for the context, no more than data.stride="
                    f"{self.stride}: raise data.max_length, lower data.stride, or remove the row"
                )

    def untruncated(self) -> None:
        """None: no context is truncated."""
        return  # windows cover the complete context

    def labeled_tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of a window, and for each whether it is part of the answer."""
        first, last = (row[key] for key in POINTS)
        has_answer = first != row["_null"]
        tokens = row["input_ids"]
        return tokens, [has_answer and first <= i <= last for i in range(len(tokens))]

    def label_text(self, row: Row) -> str:
        """A remark if the window has no answer."""
        return "no answer in this window" if row[POINTS[0]] == row["_null"] else ""

    def label_counts(self, rows: Dataset) -> dict[str, int]:
        """Numbers of windows with and without answer, and of questions."""
        pairs = zip(rows[POINTS[0]], rows["_null"], strict=True)
        without = sum(first == null for first, null in pairs)
        return {
            "windows with the answer": len(rows) - without,
            "windows without": without,
            "questions": len(set(rows["_number"])),
        }

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads windows."""
        return partial(batch_of_windows, Pad(pad_id(tokenizer), multiple))

    def items(self, batch: Batch) -> int:
        """Number of windows."""
        return batch["input_ids"].shape[0]

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Logits of starts, then of ends, then the loss in nats, of each window: [B, 2*T' + 1].

        T' is `max_length` rounded up, so that all batches have the same width.
        """
        starts, ends = outputs.start_logits.float(), outputs.end_logits.float()
        loss = window_loss(starts, ends, batch, reduction="none")
        return torch.cat([self.predict(outputs, batch), loss[:, None]], 1)

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Logits of starts, then of ends, of each window: [B, 2*T'], T' as in `score`."""
        width = -(-self.max_length // MAX_MULTIPLE) * MAX_MULTIPLE  # rounded up
        points = outputs.start_logits.float(), outputs.end_logits.float()
        return torch.cat([F.pad(logits, (0, width - logits.shape[1])) for logits in points], 1)

    def summarize_rows(self, values: Tensor, rows: Dataset) -> dict[str, float]:
        """Exact match and F1 of the words, loss in nats per window, number of questions."""
        points, loss = np.split(values.cpu().numpy(), [-1], axis=1)
        needed = rows.select_columns(["_number", "_context", "_answers", "_offsets", "_null"])
        found = [answer for _, answer in self.described(points, needed)]
        return {
            "exact_match": sum(answer["exact_match"] for answer in found) / len(found),
            "f1": sum(answer["f1"] for answer in found) / len(found),
            "loss": float(loss.mean()),
            "rows": float(len(found)),
        }

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The answer to each question, its place and probability, and scores of labeled rows.

        The probability is that of start and end in the window of the answer.
        """
        # by the number of the question, over all of its windows
        best: dict[int, Span] = {}
        nulls: dict[int, Span] = {}  # the minimum: a single sure window counts
        answers: dict[int, list[str]] = {}
        for value, row in zip(values, rows, strict=True):
            number, null, offsets = row["_number"], row["_null"], row["_offsets"]
            if "_answers" in row:
                answers[number] = json.loads(row["_answers"])
            start, end = np.split(value, 2)
            span = best_span(start, end, offsets, row["_context"], self.max_answer_length)
            # spans compare by their logit first
            best[number] = max(best.get(number, span), span)
            sure = probability(start, end, null, null, len(offsets))
            empty = Span(float(start[null] + end[null]), "", None, sure)
            nulls[number] = min(nulls.get(number, empty), empty, key=lambda each: each.logit)
        for number, span in best.items():
            is_empty = self.unanswerable and nulls[number].logit > span.logit
            yield number, scored(nulls[number] if is_empty else span, answers.get(number))

    def head_loss(self, logits: Tensor, labels: Batch) -> Tensor:
        """The mean loss of start and end, from logits [B, T, 2]."""
        return window_loss(logits[..., 0], logits[..., 1], labels)

    def head_logits(self, outputs: Outputs) -> Tensor:
        """Logits of starts and ends, [B, T, 2]."""
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)

    def outputs_from_logits(self, logits: Tensor) -> Outputs:
        """Start and end logits as the model returns them."""
        points = SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])
        return cast("Outputs", points)


def scored(span: Span, answers: Sequence[str] | None) -> Prediction:
    """Describe the answer to a question; with the right answers, if they are known, and scores."""
    found = {"prediction": span.text, "start": span.start, "probability": rounded(span.probability)}
    if answers is None:
        return found
    exact, words = (best_of(score, span.text, answers) for score in (squad_exact, squad_f1))
    return {"label": list(answers), **found, "exact_match": exact, "f1": words}


def window_loss(
    starts: Tensor, ends: Tensor, batch: Mapping[str, Tensor], reduction: str = "mean"
) -> Tensor:
    """The mean of the losses of start and end: cross-entropy over all tokens except padding."""
    # padding would otherwise be a candidate position
    padding = batch["attention_mask"] == 0
    losses = [
        F.cross_entropy(
            logits.float().masked_fill(padding, MASKED_LOGIT), batch[key], reduction=reduction
        )
        for logits, key in zip((starts, ends), POINTS, strict=True)
    ]
    return (losses[0] + losses[1]) / 2


def without_padding(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, Tensor], output: T
) -> T:
    """Forward hook: replace the loss of transformers, in which padding tokens are candidates.

    That loss depends on the length of the other rows of a batch.
    """
    if kwargs.get(POINTS[0]) is not None and kwargs.get("attention_mask") is not None:
        output["loss"] = window_loss(output["start_logits"], output["end_logits"], kwargs)
    return output


def null_place(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """The null position of a window, the label if there is no answer: [CLS], else token 0."""
    cls = tokenizer.cls_token_id
    return ids.index(cls) if cls in ids else 0


def point(
    offsets: Sequence[tuple[int, int]], null: int, starts: Sequence[int], answers: Sequence[str]
) -> tuple[int, int]:
    """The first and last token of the first answer, or (null, null) if the window lacks it."""
    if not answers:
        return null, null
    # spaces at its ends belong to no token, or to one of the next word
    answer = answers[0].strip()
    start = starts[0] + answers[0].index(answer)
    end = start + len(answer)
    # tokens of the context with at least one character
    inside = [i for i, span in enumerate(offsets) if span != OUTSIDE and span[0] < span[1]]
    # a part of the answer is outside of the window: as if it had none
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return null, null
    # a token may extend beyond the answer, so overlap counts
    overlapping = [i for i in inside if offsets[i][0] < end and offsets[i][1] > start]
    return (overlapping[0], overlapping[-1]) if overlapping else (null, null)


def best_span(
    starts: np.ndarray,
    ends: np.ndarray,
    offsets: Sequence[Sequence[int]],
    context: str,
    max_tokens: int,
) -> Span:
    """The most likely span of up to `max_tokens` tokens, by the sum of its logits."""
    spans = np.asarray(offsets)
    inside = np.flatnonzero(spans[:, 0] < spans[:, 1])
    if not len(inside):
        return NO_SPAN
    # stable: of equal logits the earlier position, the same on all machines
    first = inside[np.argsort(-starts[inside], kind="stable")[:CANDIDATES]]
    last = inside[np.argsort(-ends[inside], kind="stable")[:CANDIDATES]]
    length = last[None] - first[:, None] + 1
    # ends before starts and spans that are too long are excluded
    sums = np.where(
        (length > 0) & (length <= max_tokens), starts[first][:, None] + ends[last], -np.inf
    )
    i, j = np.unravel_index(sums.argmax(), sums.shape)
    if not np.isfinite(sums[i, j]):
        return NO_SPAN
    begin, end = int(spans[first[i], 0]), int(spans[last[j], 1])
    sure = probability(starts, ends, first[i], last[j], len(offsets))
    return Span(float(sums[i, j]), context[begin:end], begin, sure)


def probability(starts: np.ndarray, ends: np.ndarray, first: int, last: int, length: int) -> float:
    """The probability that the answer begins and ends at these tokens of a window.

    Args:
        starts, ends: logits, with padding after `length` tokens.
    """
    sure = 1.0
    for logits, place in ((starts[:length], first), (ends[:length], last)):
        powers = np.exp(logits - logits.max())
        sure *= float(powers[place] / powers.sum())
    return sure


def batch_of_windows(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, optionally `token_type_ids` [B, T]; start and end [B]."""
    labels = [key for key in POINTS if key in rows[0]]
    return {**pad.inputs(rows), **{k: torch.tensor([row[k] for row in rows]) for k in labels}}
