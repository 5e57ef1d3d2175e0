"""What every task family answers."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset, Features
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from petl.errors import InputError
from petl.tasks.encoding_cache import encode_once
from petl.tasks.rows import IGNORED, UNCUT, Columns, Pad, Row

CHUNK = 1024  # tokens whose logits are held in float32 at a time
logger = logging.getLogger(__name__)


class Task(ABC):
    """A family of tasks. An instance holds what its data fix: classes, lengths.

    What is said here of rows and batches is true of texts; images and sounds override it. The
    *processor* is what makes the model's inputs: its tokenizer, image processor or feature
    extractor.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str | None]  # None: PEFT has no class for such models
    metric: ClassVar[str]  # the key of `summarize` that best checkpoint and early stopping watch
    higher_is_better: ClassVar[bool]
    reads_text: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"  # what `lengths` counts
    encoded_at_once: ClassVar[int] = 1000  # rows in memory while they are encoded
    one_for_one: ClassVar[bool] = False  # whether each row gives one encoded row, or is an error
    new_head: ClassVar[bool] = True  # on top of the pretrained body, which the model may lack
    truths: ClassVar[tuple[str, ...]] = ("labels",)  # of a batch: what no model is asked with
    group: ClassVar[str | None] = None  # a column; rows that share its value are held out together
    by_row: ClassVar[bool] = False  # whether `score` gives figures of each row, not sums

    max_length: int  # tokens of a row, of texts
    generate: int | None = None  # most tokens of answers that are generated to score the test rows

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None when there are no classes."""
        return None

    @property
    def longest(self) -> int:
        """Most tokens that the model sees at once, of texts."""
        return self.max_length

    @property
    def packs(self) -> bool:
        """Whether a row may hold several texts, which must not see one another."""
        return False

    @property
    @abstractmethod
    def auto_class(self) -> type[Any]:
        """The transformers Auto class whose models serve this task."""

    @property
    def processor_class(self) -> type[Any]:
        """The transformers Auto class of the processor."""
        return AutoTokenizer

    def model_kwargs(self) -> dict[str, Any]:
        """Settings that the model's config needs from the task."""
        return {}

    def adjust(self, model: Any) -> None:  # noqa: B027  most tasks need nothing
        """Have a model that was just loaded treat batches of this task as they are meant."""

    @abstractmethod
    def encode_rows(self, processor: Any, rows: Columns, /) -> Columns:
        """Raw columns to lists `input_ids`, `attention_mask`, `labels`; may drop or cut rows.

        Columns that scores need and batches do not have names that begin with `ASIDE`.
        """

    def features(self, processor: Any) -> Features | None:
        """Types and shapes of encoded rows; None: as `datasets` finds them."""
        return None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything of the task that `encode_rows` depends on, as JSON takes it."""

    def encode(self, processor: Any, split: Dataset, /) -> Dataset:
        """Rows of lists `input_ids`, `attention_mask`, `labels`; kept on disk by content.

        Raises:
            InputError: no row is left to learn from, or the processor does not suit the rows.
        """
        encoded = encode_once(self, processor, split)
        if len(encoded) == 0:
            raise InputError(
                f"none of the {len(split)} rows can be learned from{self.why_dropped()}"
            )
        dropped = len(split) - len(encoded)
        if dropped > 0 and not self.packs:
            logger.warning("dropped %d of %d rows%s", dropped, len(split), self.why_dropped())
        return encoded

    def why_dropped(self) -> str:
        """Why `encode_rows` leaves a row out, for the end of a message."""
        return ""

    # What a preview shows

    def whole(self) -> "Task | None":
        """This task, except that it cuts no row; None where rows are not cut."""
        return replace(self, max_length=UNCUT)  # ty: ignore[invalid-argument-type]

    def is_cut(self, row: Row) -> bool:
        """Whether a row that `whole` encoded is longer than this task takes."""
        return len(row["input_ids"]) > self.max_length

    def marks(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of an encoded row, and which of them the model is to tell or to point at."""
        return row["input_ids"], [False] * len(row["input_ids"])

    def truth(self, row: Row) -> str:
        """What else an encoded row is to teach, in words; "" if that is all in `marks`."""
        return ""

    def counts(self, rows: Dataset) -> dict[str, int]:
        """How often each kind of truth there is among encoded rows; empty where there are none."""
        return {}

    # Batches

    def lengths(self, rows: Dataset) -> list[int]:
        """How long each encoded row is, in `unit`."""
        return [len(ids) for ids in rows["input_ids"]]

    def count(self, batch: dict[str, Tensor]) -> int:
        """How much a batch holds, in `unit`, padding left out; ask while it is on the CPU."""
        return int(batch["attention_mask"].sum())

    def positions(self, batch: dict[str, Tensor]) -> int:
        """The same with padding, which is computed like the rest."""
        return batch["input_ids"].numel()

    def width(self, batch: dict[str, Tensor]) -> int | None:
        """Tokens of each row of a batch, padding included; None where rows have none."""
        return batch["input_ids"].shape[1]

    @abstractmethod
    def collate(
        self, processor: Any, /, multiple: int = 1
    ) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        """What makes a batch of encoded rows: CPU tensors, padded on the right to the longest row.

        `multiple` rounds the length up, which suits tensor cores at 8.
        """

    @abstractmethod
    def items(self, batch: dict[str, Tensor]) -> int:
        """How many terms the model's loss averages over; ask while the batch is on the CPU."""

    @abstractmethod
    def score(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Sums over the batch, [S], on the model's device; they add over batches and processes.

        Of a task whose scores are no such sums (`by_row`): figures of each row, [B, S].
        """

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Scores by name, from the sum of what `score` gave for disjoint batches, [S]."""
        raise NotImplementedError(f"the scores of {self.name} are made by `summarize_rows`")

    def summarize_rows(self, figures: Tensor, rows: Dataset) -> dict[str, float]:
        """Scores by name, with `by_row`.

        Args:
            figures: what `score` gave for each row, in the order of `rows`, [N, S].
            rows: the encoded rows.
        """
        raise NotImplementedError(f"the scores of {self.name} are made by `summarize`")

    def head_loss(self, logits: Tensor, truths: dict[str, Tensor]) -> Tensor:
        """The model's loss, from what its head makes and the `truths` of a batch."""
        raise NotImplementedError(f"{self.name} has no head")

    def head_logits(self, outputs: Any) -> Tensor:
        """What the model's head made, [B, C], or [B, T, C] of a head that speaks of every token."""
        return outputs.logits

    def of_head(self, logits: Tensor) -> Any:
        """The model's outputs, as `score` takes them, from what its head makes."""
        return SimpleNamespace(logits=logits)


def batch_of_tokens(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each [B, T]."""
    return {**pad.inputs(rows), "labels": pad.stack(rows, "labels", IGNORED)}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills short rows; masked by attention, so that it may be the end token."""
    found = tokenizer.pad_token_id
    assert isinstance(found, int), "load_tokenizer gives every tokenizer a padding token"
    return found


def sums_dtype(device: torch.device) -> torch.dtype:
    """The widest float that the device adds in."""
    return torch.float32 if device.type == "mps" else torch.float64


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Tokens with a label and their summed loss in nats, [2], of logits [B, T, V]."""
    dtype = sums_dtype(logits.device)
    loss = torch.zeros((), dtype=dtype, device=logits.device)
    step = max(1, CHUNK // labels.shape[0])
    for start in range(0, labels.shape[1], step):
        piece = logits[:, start : start + step].float().flatten(0, 1)
        truth = labels[:, start : start + step].flatten()
        loss += F.cross_entropy(piece, truth, ignore_index=IGNORED, reduction="sum").to(dtype)
    return torch.stack([(labels != IGNORED).sum().to(dtype), loss])


def perplexity(total: Tensor) -> dict[str, float]:
    """Loss in nats a token, its perplexity and the tokens, of sums of `summed_loss`."""
    tokens, loss = total.double().cpu()
    mean = loss / tokens
    return {"loss": mean.item(), "perplexity": mean.exp().item(), "tokens": tokens.item()}


def packs(model: PreTrainedModel) -> bool:
    """Whether `keep_texts_apart` was told of this model."""
    return getattr(model, "petl_packs", False)
