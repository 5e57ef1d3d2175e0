"""The base classes of tasks, types and padding of encoded rows, functions that several tasks use.

Shapes: B rows, T tokens.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Generic, Protocol, SupportsFloat, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass as AutoModelClass

from petl.data.tasks import NEW_TOKENS
from petl.data.tasks.encoding_cache import Columns, encode_once, sizes_of
from petl.data.tasks.scores import LOSSES
from petl.data.validation import Row
from petl.errors import InputError
from petl.ops import IGNORED
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.paths import LABELS
from petl.system.values import field

CHUNK = 1024  # tokens whose logits are converted to float32 at a time; assumption
logger = logging.getLogger(__name__)

FILE = "task.json"  # in an adapter's folder

UNTRUNCATED = 2**30  # a max_length in tokens that no row reaches

NON_INPUT_PREFIX = "_"  # begins the names of encoded columns that are not model inputs

Prediction = dict[str, Any]  # JSON values by name
Batch = Mapping[str, Tensor]
Collate = Callable[[Sequence[Row]], dict[str, Tensor]]
AutoProcessorClass = AutoTokenizer | AutoImageProcessor | AutoFeatureExtractor | AutoProcessor
Fields = dict[str, object]  # of a config, or of settings, by name
P = TypeVar("P")  # a processor: a tokenizer, image processor or feature extractor


class Outputs(Protocol):
    """What a model returns: tensors by name, such as `logits`."""

    def __getattr__(self, name: str, /) -> Tensor:
        """A tensor by its name."""


def source_numbers(rows: Columns, kept: Iterable[int]) -> Columns:
    """The column `_number` of encoded rows: the `number` of the row that each was made of.

    It is absent if the rows have none.

    Args:
        kept: the position in `rows` of the row that each encoded row was made of.
    """
    return {"_number": [rows["number"][i] for i in kept]} if "number" in rows else {}


@dataclass(frozen=True)
class Pad:
    """Pads rows on the right to the longest of the batch, rounded up to `multiple` tokens."""

    pad_id: int
    multiple: int = 1

    def stack(self, rows: Sequence[Row], key: str, fill: int) -> Tensor:
        """Stack one column of the rows with padding, [B, T] int64."""
        # rounded up to a multiple
        longest = max(len(row[key]) for row in rows)
        length = -(-longest // self.multiple) * self.multiple
        stacked = torch.full((len(rows), length), fill, dtype=torch.long)
        for i, row in enumerate(rows):
            stacked[i, : len(row[key])] = torch.as_tensor(row[key], dtype=torch.long)
        return stacked

    def inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, if rows have them, `token_type_ids`, [B, T] each."""
        fills = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0}
        return {key: self.stack(rows, key, fill) for key, fill in fills.items() if key in rows[0]}


class BaseFiles(Protocol):
    """The base model of a task, as far as a task reads it before it is loaded."""

    @property
    def is_decoder(self) -> bool:
        """True if tokens see only those before them, and there is no encoder."""
        ...

    @property
    def has_decoder(self) -> bool:
        """True if there are an encoder and a decoder."""
        ...

    def json_file(self, name: str) -> object:
        """The content of a JSON file beside the weights; None if there is none."""
        ...

    def tensors(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of a further safetensors file; {} if there is none."""
        ...


@dataclass(kw_only=True)
class AddedVocabulary:
    """What a task adds to the vocabulary of a model.

    Attributes:
        new_tokens: whose rows train, see petl/data/models/new_tokens.py.
    """

    new_tokens: list[str] | None = field(None, NEW_TOKENS)


class Task(AddedVocabulary, ABC, Generic[P]):
    """A task. Its attributes depend on the data set: classes, lengths.

    The methods on rows and batches here are for texts; tasks on images and sounds override them.
    The *processor* prepares the model's inputs: a tokenizer, image processor or feature extractor.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str | None]  # None: PEFT has no task type for it
    metric: ClassVar[str]  # the key of `summarize` for best checkpoint and early stopping
    higher_is_better: ClassVar[bool]
    auto_class: ClassVar[type[AutoModelClass]]  # whose models serve this task
    processor_class: ClassVar[type[AutoProcessorClass]] = AutoTokenizer
    encoded_by: ClassVar[tuple[str, ...]] = ("max_length",)  # attributes that `encode_rows` reads
    reads_text: ClassVar[bool] = True
    tensors_by_row: ClassVar[bool] = True  # each tensor of a batch has one entry for each row
    loss_unit: ClassVar[str] = ""  # in brackets after a blank
    unit: ClassVar[str] = "tokens"  # what `lengths` counts
    encoded_at_once: ClassVar[int] = 1000  # rows of a call of `encode_rows`
    keeps_before: ClassVar[bool] = False  # a run keeps the predictions before training, too
    one_for_one: ClassVar[bool] = False  # each row gives exactly one encoded row
    new_head: ClassVar[bool] = True  # the task has a head that pretrained weights may lack
    unread: ClassVar[tuple[str, ...]] = ()  # modules of the model whose weights may be absent
    label_columns: ClassVar[tuple[str, ...]] = (
        "labels",
    )  # columns of a batch that a model without loss does not take
    group: ClassVar[str | None] = None  # column; rows with equal values are held out together
    by_row: ClassVar[bool] = False  # `score` returns values of each row, not sums over rows
    writes: ClassVar[bool] = False  # the model's prediction is a text that it generates
    # of encoded rows with `generate`; the length of the first is that of the prompt
    prompt_columns: ClassVar[tuple[str, ...]] = ("_prompt",)
    sums_predictions: ClassVar[bool] = False  # `score` returns the sum of `predict` over the rows
    shown: ClassVar[tuple[str, ...]] = ("text", "text_pair")  # raw columns kept with predictions
    tasks: Sequence[str] = ()  # names of the tasks of rows, see petl.data.tasks.row_tasks
    scores_by_task: ClassVar[bool] = False  # `summarize` also gives the scores of each of `tasks`
    file_kind: ClassVar[str | None] = None  # the task whose columns files of rows have; None: name

    prefix: str = ""  # before each input
    threshold: float | None = None  # probability from which a class is predicted
    max_length: int  # tokens of a row; texts only
    generate: int | None = (
        None  # maximum new tokens when answers of test rows are generated and scored
    )

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None if the task has no classes."""
        return None

    @property
    def longest(self) -> int:
        """Maximum number of tokens in a sequence, generated ones included; texts only."""
        return self.max_length

    @property
    def used_as(self) -> str:
        """The name of the task whose lines of Python use a finished adapter."""
        return self.name

    @property
    def packs(self) -> bool:
        """True if a row may hold several texts, between which there must be no attention."""
        return False

    def model_kwargs(self) -> Fields:
        """Fields of the model's config that depend on the task."""
        return {}

    def take_base(self, base: BaseFiles) -> None:
        """Take from the files of the base model what settings leave open, before rows are read."""

    def adjust(self, model: PreTrainedModel) -> None:
        """Modify a model that was just loaded for the batches of this task (hooks, flags)."""

    def check_model(self, model: PeftModel) -> None:
        """Raise InputError if this model with its adapter does not compute what the task needs."""

    def model_files(self, model: PreTrainedModel) -> dict[str, object]:
        """Files, by name, that belong beside a model of this task: content of JSON, or bytes."""
        return {}

    def saved_tokenizer(self, tokenizer: PreTrainedTokenizerBase, /) -> PreTrainedTokenizerBase:
        """The tokenizer that gives the tokens of this task by itself."""
        return tokenizer

    @abstractmethod
    def encode_rows(self, processor: P, rows: Columns, /) -> Columns:
        """Encode raw columns as lists `input_ids`, `attention_mask`, `labels`.

        May drop, truncate or split rows. Names of columns that scores need and batches do not
        begin with `NON_INPUT_PREFIX`. Rows to predict have no labels, and then no encoded row has.
        """

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of predicted mappings from text to number whose keys differ between rows."""
        return ()

    def features(self, processor: P, /) -> Features | None:
        """Types and shapes of encoded rows; None: inferred by `datasets`."""
        return None

    def settings(self) -> Fields:
        """All that `encode_rows` depends on besides its arguments, JSON-serializable."""
        return {"task": self.name, **{name: getattr(self, name) for name in self.encoded_by}}

    def encode(self, processor: P, split: Dataset, /) -> Dataset:
        """Encode all rows of a split; the result is cached on disk by its content.

        Raises:
            InputError: no row is left to train on, or the processor does not suit the rows.
        """
        encoded = encode_once(self, processor, split)
        if len(encoded) == 0:
            raise InputError(f"none of the {len(split)} rows can be used{self.why_dropped()}")
        dropped = len(split) - len(encoded)
        # packing changes the number of rows without dropping text
        if dropped > 0 and not self.packs:
            logger.warning("dropped %d of %d rows%s", dropped, len(split), self.why_dropped())
        return encoded

    def why_dropped(self) -> str:
        """Why `encode_rows` drops rows, for the end of a message."""
        return ""

    def nothing_to_learn(self, rows: Dataset, batch_size: int) -> str:
        """Why steps of so many of these encoded rows cannot teach anything; "" if they can."""
        return ""

    def rows_to_score(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The raw rows to score, from rows with labels as the task trains on."""
        return rows

    def scored_rows(self, train: Dataset, validation: Dataset) -> Dataset:
        """The encoded rows that validation scores, from those that were held out.

        Args:
            train: the other encoded rows.
        """
        return validation

    # For `petl data`, which previews rows

    def untruncated(self) -> "Task | None":
        """A copy of this task that truncates no row; None if the task never truncates."""
        return replace(self, max_length=UNTRUNCATED)

    def is_truncated(self, row: Row) -> bool:
        """True if a row that `untruncated()` encoded is longer than this task allows."""
        return len(row["input_ids"]) > self.max_length

    def labeled_tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of an encoded row, and for each True if it is a target of the model."""
        return row["input_ids"], [False] * len(row["input_ids"])

    def labeled_texts(self, row: Row) -> dict[str, tuple[list[int], list[bool]]]:
        """The `labeled_tokens` of each text of an encoded row, by a name; "" if it has one."""
        return {"": self.labeled_tokens(row)}

    def label_text(self, row: Row) -> str:
        """The label of an encoded row as text; "" if the labels are tokens (`labeled_tokens`)."""
        return ""

    def label_counts(self, rows: Dataset) -> dict[str, int]:
        """How often each class or kind of label occurs in encoded rows; empty if there are none."""
        return {}

    # Batches

    def lengths(self, rows: Dataset) -> list[int]:
        """The length of each encoded row, in `unit`."""
        return sizes_of(rows, "input_ids")

    def count(self, batch: Batch) -> int:
        """The size of a batch in `unit`, without padding. The batch must be on the CPU."""
        return int(batch["attention_mask"].sum())

    def positions(self, batch: Batch) -> int:
        """The size of a batch in `unit`, padding included: what the model computes."""
        return batch["input_ids"].numel()

    def width(self, batch: Batch) -> int | None:
        """Tokens of each row of a batch, padding included; None if rows have no tokens."""
        return batch["input_ids"].shape[1]

    @abstractmethod
    def collate(self, processor: P, /, multiple: int = 1) -> Collate:
        """A collate function: encoded rows to CPU tensors, padded on the right to the longest row.

        Args:
            multiple: the padded length is rounded up to a multiple of this; 8 suits tensor cores.
        """

    @abstractmethod
    def items(self, batch: Batch) -> int:
        """Number of terms that the model's loss averages over. The batch must be on the CPU."""

    def completed(self, model: nn.Module, batch: Batch) -> Batch:
        """A batch with what the loss needs of passes without gradients; it itself, if nothing.

        Args:
            model: with its adapters, in any mode, which is kept.
            batch: on the model's device.
        """
        return batch

    def own_loss(self, outputs: Outputs, labels: Batch) -> Tensor:
        """The loss of a task that does not train by the model's own, see `compute_loss_of`.

        Args:
            labels: the `label_columns` of a batch, as far as it has them.
        """
        raise NotImplementedError(f"{self.name} trains by the loss of the model")

    def metrics(self) -> dict[str, float]:
        """Further metrics of the last micro-batch of training, for the log."""
        return {}

    def whole_step(
        self, weighted: Sequence[tuple[Batch, float]], forward: Callable[[Batch], Outputs]
    ) -> Iterable[tuple[Batch, float]]:
        """The micro-batches of a step with their weights, as they are computed one by one.

        A task whose loss does not add up over micro-batches gives each what it needs of all.

        Args:
            forward: the outputs for a batch, without a graph.
        """
        return weighted

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """A model's outputs for a batch without its labels, as `score` and `predict` take them."""
        return model(**{k: value for k, value in batch.items() if k not in self.label_columns})

    @abstractmethod
    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Sums over the batch, [S], on the model's device, to be added over batches and processes.

        Tasks whose scores do not follow from sums (`by_row`) return values of each row, [B, S].
        """

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Scores by name, from the sum of the results of `score` over all batches, [S]."""
        raise NotImplementedError(f"{self.name} has scores by row: call summarize_rows")

    def summarize_rows(self, values: Tensor, rows: Dataset) -> dict[str, float]:
        """Scores by name, of a task with `by_row`.

        Args:
            values: results of `score` for all rows, in the order of `rows`, [N, S].
            rows: the encoded rows.
        """
        raise NotImplementedError(f"{self.name} has scores by sums: call summarize")

    def tuned(self, total: Tensor) -> "Task":
        """This task with what its predictions depend on chosen for validation rows.

        Args:
            total: the sum of the results of `score` over them.
        """
        return self

    def settle(self, scores: Mapping[str, float]) -> None:
        """Take what `tuned` has chosen from the scores on validation rows."""

    # Predictions

    def prompts(self, processor: P, rows: Columns, /) -> Sequence[Sequence[int]]:
        """The tokens after which the model writes its answer to each raw row, if it `writes`."""
        raise NotImplementedError(f"{self.name} writes no answers")

    def prompt(self, processor: P, row: Row, /) -> Sequence[int]:
        """The tokens after which the model writes its answer to an encoded row.

        Args:
            row: with `prompt_columns`.
        """
        return row[self.prompt_columns[0]]

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What `described` needs of the model's outputs, for each row of a batch: [B, ...]."""
        raise NotImplementedError(f"{self.name} predicts nothing by row")

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """Yield the number of each source row and its prediction, with the label if there is one.

        Args:
            values: the result of `predict` for each encoded row.
            rows: the encoded rows with `_number`, and with all columns that are no model inputs.
        """
        raise NotImplementedError(f"{self.name} predicts nothing by row")

    def quality(self, scores: Mapping[str, float]) -> tuple[float, float]:
        """Return the sort key of an evaluation, see `quality`."""
        return quality(scores, self.metric, higher_is_better=self.higher_is_better)

    def head_loss(self, logits: Tensor, labels: Batch) -> Tensor:
        """The model's loss, from the outputs of its head and the `label_columns` of a batch."""
        raise NotImplementedError(f"{self.name} has no head")

    def head_logits(self, outputs: Outputs) -> Tensor:
        """The outputs of the model's head, [B, C], or [B, T, C] if it classifies tokens."""
        return outputs.logits

    def outputs_from_logits(self, logits: Tensor) -> Outputs:
        """The model's outputs, as `score` takes them, from the outputs of its head."""
        return cast("Outputs", SimpleNamespace(logits=logits))


@dataclass
class TextTask(Task[PreTrainedTokenizerBase], ABC):
    """Rows of one text (`text`) or two (also `text_pair`) with one label."""

    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    one_for_one: ClassVar[bool] = True
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForSequenceClassification

    def encode_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Columns, /) -> Columns:
        """Tokenize the text or the pair of texts, truncated to `max_length`.

        Raises:
            InputError: a text has no tokens.
        """
        pair = rows.get("text_pair")
        # truncation=True shortens the longer one of two texts first
        encoded = tokenizer(rows["text"], pair, truncation=True, max_length=self.max_length)
        ids = encoded["input_ids"]
        for text, tokens in zip(rows["text"], ids, strict=True):
            if not tokens:
                raise InputError(
                    f"the text {text!r} has no tokens with this model's tokenizer: remove the row"
                )
        columns = {"input_ids": ids, "attention_mask": encoded["attention_mask"]}
        if "label" in rows:
            columns["labels"] = rows["label"]
        if pair is not None and "token_type_ids" in encoded:  # tells the first text from the second
            columns["token_type_ids"] = encoded["token_type_ids"]
        return columns

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads the tokens; labels are [B]."""
        return partial(batch_of_texts, Pad(pad_id(tokenizer), multiple))

    def items(self, batch: Batch) -> int:
        """Number of rows."""
        return len(batch["input_ids"])


@dataclass
class WritingTask(Task[P], ABC):
    """Texts that the model writes token by token, with a loss for each token that has a label."""

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    new_head: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    sums_predictions: ClassVar[bool] = True

    def score(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Number of predicted tokens, then their summed loss in nats: [2]."""
        return self.predict(outputs, batch).sum(0)

    def described(
        self, values: Iterable[np.ndarray], rows: Iterable[Row]
    ) -> Iterator[tuple[int, Prediction]]:
        """The loss of each row in nats per token, and its number of tokens."""
        for (tokens, loss), row in zip(values, rows, strict=True):
            yield row["_number"], {"loss": rounded(loss / tokens), "tokens": int(tokens)}

    def summarize(self, total: Tensor) -> dict[str, float]:
        """Loss in nats per token, perplexity, and number of tokens."""
        tokens, loss = total.double().cpu()  # float32 on some devices
        mean = loss / tokens
        return {"loss": mean.item(), "perplexity": mean.exp().item(), "tokens": tokens.item()}


class TextWritingTask(WritingTask[PreTrainedTokenizerBase], ABC):
    """A writing task whose rows are texts alone."""

    def collate(self, tokenizer: PreTrainedTokenizerBase, /, multiple: int = 1) -> Collate:
        """A collate function that pads tokens and labels."""
        return partial(batch_of_tokens, Pad(pad_id(tokenizer), multiple))


def batch_of_texts(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], `labels` [B]: int64, for regression float32."""
    if "labels" not in rows[0]:
        return pad.inputs(rows)
    # torch infers int64 for classes, float32 for numbers
    labels = torch.tensor([row["labels"] for row in rows])
    return {**pad.inputs(rows), "labels": labels}


def batch_of_tokens(pad: Pad, rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, of labeled rows, `labels`, each [B, T]."""
    inputs = pad.inputs(rows)
    return inputs | ({"labels": pad.stack(rows, "labels", IGNORED)} if "labels" in rows[0] else {})


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token; the attention mask excludes it, so that it may be the end token."""
    token = tokenizer.pad_token_id
    assert isinstance(token, int), "load_tokenizer sets a padding token"
    return token


def tokenizer_in(processor: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor for images and text; a tokenizer is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def sums_dtype(device: torch.device) -> torch.dtype:
    """The widest float dtype that the device supports, for sums."""
    return torch.float32 if device.type == "mps" else torch.float64


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of labels of each row and their summed loss in nats, [B, 2], from logits [B, T, V].

    Logits are converted to float32 in chunks, which bounds the memory with a large vocabulary.
    """
    dtype = sums_dtype(logits.device)
    loss = torch.zeros(labels.shape[0], dtype=dtype, device=logits.device)
    # tokens per row and chunk, so that a chunk has about CHUNK tokens
    step = max(1, CHUNK // labels.shape[0])
    for start in range(0, labels.shape[1], step):
        chunk = logits[:, start : start + step].float().flatten(0, 1)
        target = labels[:, start : start + step]
        losses = F.cross_entropy(
            chunk, target.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(target.shape)
        loss += losses.to(dtype).sum(1)
    return torch.stack([(labels != IGNORED).sum(1).to(dtype), loss], 1)


def summed_loss_at(wanted: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The result of `summed_loss` from the logits of the wanted positions.

    Args:
        wanted: positions, [B, T] bool, N in all.
        logits: [N, V].
        labels: that each position predicts, [B, T]; those of other positions do not count.
    """
    loss = torch.zeros(labels.shape, dtype=sums_dtype(logits.device), device=logits.device)
    targets, losses = labels[wanted], []
    for start in range(0, max(1, len(targets)), CHUNK):
        part = slice(start, start + CHUNK)
        losses.append(F.cross_entropy(logits[part].float(), targets[part], reduction="none"))
    # in place, and not added row by row in an order that differs from run to run on GPUs
    loss[wanted] = torch.cat(losses).to(loss.dtype)
    return torch.stack([wanted.sum(1).to(loss.dtype), loss.sum(1)], 1)


def rounded(value: SupportsFloat) -> float:
    """Round a number of a prediction to six digits, which float32 has."""
    return float(f"{float(value):.6g}")


def need_offsets(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Raise InputError unless the tokenizer returns the character offsets of tokens."""
    if not tokenizer.is_fast:
        raise InputError(
            f"data.task={task} needs the character offsets of tokens, which "
            f"{type(tokenizer).__name__} does not return: use the model's fast tokenizer"
        )


def quality(
    scores: Mapping[str, float], metric: str, *, higher_is_better: bool
) -> tuple[float, float]:
    """Return the sort key of an evaluation, higher is better: its metric, then its negated loss.

    A value that is absent or not finite counts as the worst. Checkpoints, learning rates, settings
    of a sweep and entries of a comparison are all chosen by it; of equal ones, the earlier.
    """
    loss = next((scores[name] for name in LOSSES if name in scores), math.inf)
    sign = 1 if higher_is_better else -1
    return _worst_if_not_finite(sign * scores.get(metric, math.nan)), _worst_if_not_finite(-loss)


def _worst_if_not_finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def not_finite(scores: Mapping[str, float]) -> str | None:
    """Return the name of the first score that is NaN or infinite; None if there is none.

    The perplexity is left out: it overflows with a loss that is finite.
    """
    names = (name for name in scores if name != "perplexity")
    return next((name for name in names if not math.isfinite(scores[name])), None)


def write_task(folder: Path, task: Task) -> None:
    """Save a task, with its classes and lengths, in an adapter's folder; see tasks/task_file.py."""
    # in order: the order of classes is the numbering of the head's outputs
    saved = {"task": task.name, **asdict(task)}
    if not task.new_tokens:
        saved.pop("new_tokens")
    if task.tasks:
        saved["tasks"] = list(task.tasks)
    write_atomic(folder / FILE, as_json(saved, in_order=True))


def write_labels(folder: Path, fields: Mapping[str, object]) -> None:
    """Save names of labels and type of problem, for PEFT's auto classes; see core/auto_classes.py.

    Args:
        fields: of the model's config, see `Task.model_kwargs`; without labels, nothing is saved.
    """
    if "id2label" in fields:
        saved = {"id2label": fields["id2label"], "problem_type": fields.get("problem_type")}
        write_atomic(folder / LABELS, as_json(saved, in_order=True))
