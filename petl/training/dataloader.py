"""The encoded rows of a run: splits, and batches collated and moved to the device.

Splits are checked: it is warned about scores that say less than they seem to, and about labels
without rows.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from pyarrow import types
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from petl.core.types import Processor
from petl.data.base import RawData, Stream, as_dataset
from petl.data.batch_sampler import (
    ENOUGH_STEPS,
    Buckets,
    Ints,
    SequentialStepSampler,
    StepOrder,
    StepSampler,
    permutation,
)
from petl.data.overlap import Overlap, TrainingInputs
from petl.data.refused_rows import encode_usable
from petl.data.tasks import SET
from petl.data.tasks.base import NON_INPUT_PREFIX, Row, Task
from petl.data.tasks.classification import SingleLabelTask
from petl.data.tasks.encoding_cache import encode_once, values_of
from petl.data.validation import FaultyRow
from petl.errors import InputError
from petl.system.processes import endings_blocked, ignore_foreign_signals
from petl.training.runs.settings import TrainConfig

if TYPE_CHECKING:
    from petl.data.streaming import StreamedRows
    from petl.data.task_mixture import TaskMixture

logger = logging.getLogger(__name__)
REGRESSION = "regression"  # the name of the task
Batch = dict[str, Tensor]
AnyBatch = TypeVar("AnyBatch")  # also with values that are no tensors
Collate = Callable[[Sequence[Row]], Batch]
WORKER_ERROR = re.compile(r"Caught .* in DataLoader worker.*\n[\w.]+: (.*)\n", re.DOTALL)
SAMPLED = 1000  # rows of a digest; at most about twice as many
AT_ONCE = 64  # of them in memory
SPLIT_SEED = 13  # not train.seed: runs of all seeds are scored on the same validation rows


@dataclass(frozen=True)
class Splits:
    """The encoded rows of a run with their task.

    Attributes:
        validation: rows held out from train, on which only training decisions depend; or None.
        processor: the tokenizer or other processor that encoded the rows.
        buckets: of the train rows; None: rows of any length meet in a step.
        order: of the train rows, which a feature of the run has chosen; None: shuffled.
        sources: the test rows before they were encoded; None: unknown.
        mixture: of the tasks of the train rows; None: each epoch visits each row once.
        overlap: test rows that are training rows; None: unknown.
        skipped: rows that cannot be used and were left out, by split.
        inputs: of the training rows; None: unknown.
        sets: names of the sets of a mixture, whose encoded rows have the number of theirs.
    """

    task: Task
    collate: Collate
    train: "Dataset | StreamedRows"
    validation: Dataset | None
    test: Dataset
    processor: Processor
    buckets: Buckets | None = None
    sources: Dataset | None = None
    order: StepOrder | None = None
    mixture: "TaskMixture | None" = None
    overlap: Overlap | None = None
    skipped: Mapping[str, Sequence[FaultyRow]] = field(default_factory=dict)
    inputs: TrainingInputs | None = None
    sets: Sequence[str] = ()

    @property
    def mixed(self) -> "Splits":
        """The same rows in an order in which the first ones are of all kinds."""
        is_stream = self.order is not None and self.order.is_stream
        return replace(self, order=None) if is_stream else self

    def parts(self, settings: TrainConfig) -> list[Dataset]:
        """Return the train, validation and test rows that a run reads."""
        parts = [self.known, self.validation, self.test if settings.test else None]
        return [part for part in parts if part is not None and len(part)]

    def passes(self, settings: TrainConfig) -> float:
        """Return how often a run reads its train rows."""
        sampler = self.sampler(settings)
        repeats = 1 if self.order is None else self.order.repeats
        return repeats * sampler.steps / sampler.steps_per_epoch

    @property
    def known(self) -> Dataset:
        """The train rows, which must not be a stream."""
        assert isinstance(self.train, Dataset), "callers refuse streams"
        return self.train

    def sampler(
        self, settings: TrainConfig, done: int = 0, rank: int = 0, processes: int = 1
    ) -> StepSampler:
        """Return the rows of the steps after `done`, for one of the processes of a run."""
        if not isinstance(self.train, Dataset):
            # the number of rows is unknown: the run is one epoch of as many rows as it needs
            # steps is set: `stream_splits` refuses a stream without it
            kind, rows = SequentialStepSampler, (settings.steps or 0) * settings.batch_size
        else:
            kind, rows = StepSampler, len(self.train)
        sampler = kind(
            rows=rows,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            steps=0,
            seed=settings.seed,
            done=done,
            rank=rank,
            processes=processes,
            buckets=self.buckets or self.order,
            mixture=self.mixture,
        )
        if self.order is not None and self.order.is_stream:
            length = sampler.steps_per_epoch
            return replace(sampler, steps=length if settings.steps is None else settings.steps)
        # made with 0 steps first, since the sampler knows how many an epoch has
        return replace(sampler, steps=settings.steps_of_run(sampler.steps_per_epoch))


class TrainingRows(NamedTuple):
    """The training rows of a run, before there are steps.

    Attributes:
        settings: under `train`.
        processor: that encoded the rows.
        train: encoded rows; a stream is encoded while it is read.
        order: of the rows; None: shuffled in each epoch.
        mixture: which rows an epoch visits; None: each row once.
        inputs: of the raw rows; None: unknown.
    """

    task: Task
    settings: TrainConfig
    processor: Processor
    train: Dataset | Stream
    order: StepOrder | None = None
    mixture: "TaskMixture | None" = None
    inputs: TrainingInputs | None = None


def encode_splits(
    data: RawData,
    processor: Processor,
    settings: TrainConfig,
    accelerator: Accelerator,
    orders: Iterable[Callable[[TrainingRows], TrainingRows]] = (),
) -> Splits:
    """Encode data and hold out validation rows if `settings.eval_steps` asks for them.

    Args:
        data: from `read_data`.
        processor: from `load_processor`, for the model and the task.
        orders: choose training rows and their order.

    Raises:
        InputError: too few rows to hold any out, too few steps for the warm-up, or a row too long
            for `train.max_tokens` or `train.batch_sizes`.
    """
    task = data.task
    # a stream is encoded while it is read, by the loader
    if isinstance(data.train, Stream):
        for choose in orders:  # which may refuse it
            choose(TrainingRows(task, settings, processor, data.train))
        return stream_splits(data, processor, settings, accelerator)
    with accelerator.main_process_first():  # the others then read its cache
        data, (train, test) = encode_usable(
            data, processor, lambda data: (as_dataset(data, 0), numbered(data.test))
        )
        raw, sources = as_dataset(data, 0), numbered(data.test)
        warn_about_truncation(task, processor, data.test, test)
    if data.sets:
        train, test = in_sets(train, raw), in_sets(test, sources)
    inputs = TrainingInputs.of(task, raw, data.near_duplicates)
    overlap = inputs.overlap(data.test) if inputs else None
    if overlap is not None and overlap.found:
        logger.warning("%s: the model may know them by heart", overlap)
    train, validation = hold_out(train, settings.validation_fraction, task.group)
    if reason := task.nothing_to_learn(train, settings.batch_size):
        raise InputError(reason)
    if validation is not None:
        validation = task.scored_rows(train, validation)
    warn_about_labels(task, {"training": train, "validation": validation, "test": test})
    multiple = 1 if accelerator.device.type == "cpu" else 8  # tensor cores need multiples of 8
    collate = task.collate(processor, multiple)
    rows = TrainingRows(task, settings, processor, train, inputs=inputs)
    for choose in orders:
        rows = choose(rows)
    train, order, mixture = rows.train, rows.order, rows.mixture
    assert isinstance(train, Dataset), "no stream, as above"
    # an order by class or by task, and packed rows, have steps of their own
    free = order is None and mixture is None and not task.packs
    may_sort = free if settings.buckets == "auto" else settings.buckets is not None
    sorts = settings.bucket_settings or may_sort
    buckets = buckets_of(row_lengths(task, train), settings) if sorts else None
    if buckets is not None and not settings.bucket_settings:
        logger.info("train.buckets=auto: %d buckets", len(buckets.rows))
    splits = Splits(
        task,
        collate,
        train,
        validation,
        test,
        processor,
        buckets,
        sources,
        order=order,
        mixture=mixture,
        overlap=overlap,
        skipped=data.skipped,
        inputs=inputs,
        sets=data.sets,
    )
    settings.warmup_steps(splits.sampler(settings).steps)  # raise before a model is loaded
    return splits


def stream_splits(
    data: RawData, processor: Processor, settings: TrainConfig, accelerator: Accelerator
) -> Splits:
    """Return the splits of a stream, whose train rows are read as they are needed.

    Raises:
        InputError: a setting that needs to know all train rows.
    """
    if settings.steps is None:
        raise InputError(
            "data.streaming=true leaves the number of rows unknown: set train.steps=N in place of "
            f"train.epochs={settings.epochs:g}"
        )
    share = settings.validation_share
    given = settings.bucket_settings or (share is not None and f"train.validation_share={share}")
    if given:
        raise InputError(
            f"{given} needs the lengths or the number of all rows, which "
            "data.streaming=true leaves unknown: leave it out; data.held_rows sets the number of "
            "validation rows"
        )
    task, stream = data.task, data.train
    assert isinstance(stream, Stream), "callers check it"
    if settings.num_workers > 1 and not task.one_for_one:
        logger.warning(
            "each of train.num_workers=%d encodes the whole stream: 1 is as fast",
            settings.num_workers,
        )
    held = stream.held if settings.eval_steps is not None else 0
    recent = settings.batch_size  # a step may read its first row again
    streamed = resolve_name("petl.data.streaming:StreamedRows")
    train = streamed(stream, task, processor, settings.seed, recent, held)
    with accelerator.main_process_first():
        data, (test,) = encode_usable(data, processor, lambda data: [numbered(data.test)])
        sources = numbered(data.test)
        warn_about_truncation(task, processor, data.test, test)
    warn_about_labels(task, {"test": test})
    collate = task.collate(processor, 1 if accelerator.device.type == "cpu" else 8)
    validation = task.scored_rows(train.held_out(), train.held_out()) if held else None
    splits = Splits(task, collate, train, validation, test, processor, sources=sources)
    # for its error only, as in `encode_splits`
    settings.warmup_steps(settings.steps)
    return splits


def splits_to_score(
    task: Task, processor: Processor, rows: Iterable[Row], multiple: int = 1
) -> Splits:
    """Return the splits of rows that are only scored, as `read_inputs` reads them."""
    sources = numbered(Dataset.from_list([*task.rows_to_score([*rows])]))
    encoded = task.encode(processor, sources)
    # in the place of the train rows too, which nothing reads
    collate = task.collate(processor, multiple)
    return Splits(task, collate, encoded, encoded, encoded, processor, sources=sources)


def in_sets(encoded: Dataset, raw: Dataset) -> Dataset:
    """Return encoded rows with the number of the set that each is from."""
    kept = encoded.column_names
    numbers = np.asarray(encoded["_number"] if "_number" in kept else range(len(encoded)))
    return encoded.add_column(SET, np.asarray(raw[SET])[numbers])


def numbered(rows: Dataset) -> Dataset:
    """Number rows, so that each prediction finds its row again when others were dropped."""
    if "number" in rows.column_names:
        return rows
    return rows.add_column("number", list(range(len(rows))))


def buckets_of(lengths: Ints, settings: TrainConfig) -> Buckets | None:
    """Return the buckets that `train.buckets` or `train.batch_sizes` makes of these lengths.

    None if `train.buckets=auto` would save no padding, or an epoch has few steps, and there is no
    `train.max_tokens`.

    Raises:
        InputError: a row too long for them.
    """
    if settings.batch_sizes is not None:
        return Buckets.of_batch_sizes(lengths, settings.batch_sizes)
    assert settings.buckets is not None, "callers check it"
    limits = settings.batch_size, settings.max_tokens, settings.quadratic
    if settings.buckets != "auto":
        return Buckets.of_equal_tokens(lengths, int(settings.buckets), *limits)
    if settings.max_tokens is None and len(lengths) < ENOUGH_STEPS * settings.batch_size:
        return None
    buckets = Buckets.of_best_count(lengths, *limits)
    # a single one sorts nothing: the order of a run without buckets
    return None if len(buckets.rows) == 1 and settings.max_tokens is None else buckets


def hold_out(
    rows: Dataset, fraction: float, group: str | None = None
) -> tuple[Dataset, Dataset | None]:
    """Split rows into those to train on and a `fraction` to validate on; None if that is 0.

    The split is the same for all seeds. All rows of the same tokens are on one side; with `group`,
    the name of a column, those with the same value there, and the fraction is that of the values.

    Raises:
        InputError: too few rows.
    """
    if not fraction:
        return rows, None
    values = unique_inputs(rows) if group is None else np.asarray(rows[group])
    groups = np.unique(values)
    count = max(1, round(fraction * len(groups)))
    if count >= len(groups):
        raise InputError(
            f"{len(groups)} training rows are too few to hold out "
            f"train.validation_share={fraction:g} of them: provide more, or lower it"
        )
    # of groups, not of rows: parts of one text would be on both sides
    order = permutation(len(groups), SPLIT_SEED, 0)
    if group is None and len(groups) == len(rows):
        return rows.select(order[count:]), rows.select(order[:count])
    held = np.isin(values, groups[order[:count]])
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def unique_inputs(rows: Dataset) -> np.ndarray:
    """The number of each row among rows of different tokens, [N]; without tokens all differ."""
    if "input_ids" not in rows.column_names:
        return np.arange(len(rows))
    numbers: dict[tuple[int, ...], int] = {}
    return np.asarray([numbers.setdefault(tuple(ids), len(numbers)) for ids in rows["input_ids"]])


def load(
    rows: "Dataset | StreamedRows",
    collate: Collate,
    batches: Iterable[list[int]],
    device: torch.device,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield batches on a device, as `load_on_cpu`."""
    for batch in load_on_cpu(rows, collate, batches, device, workers):
        yield to_device(batch, device)


def load_on_cpu(
    rows: "Dataset | StreamedRows",
    collate: Collate,
    batches: Iterable[list[int]],
    device: torch.device,
    workers: int,
) -> Iterator[Batch]:
    """Yield batches as CPU tensors, page-locked if `device`, where they will go, is a GPU.

    Args:
        batches: the rows of each batch.
        workers: processes that collate batches; 0: this one.

    Raises:
        InputError: a row cannot be read, by this process or a worker.
    """
    # columns that no batch needs are not read
    if not isinstance(rows, Dataset):
        source = rows.restarted()
    else:
        source = rows.select_columns(batched(rows))
    loader = DataLoader(
        cast(TorchDataset, source),  # what torch needs of one
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_foreign_signals,
        # page-locked memory is what lets `to_device` copy while the GPU computes
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the default one is that of the dropout masks
    )
    with endings_blocked():
        batches_of_workers = iter(loader)  # forks them
    return without_worker_traceback(batches_of_workers)


def without_worker_traceback(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches; raise a worker's InputError with its own message, without traceback."""
    try:
        yield from batches
    except InputError as error:
        # torch raises a worker's error again with the traceback as its message
        match = WORKER_ERROR.fullmatch(str(error))
        if match is None:
            raise
        raise type(error)(match[1]) from error


def batched(rows: Dataset) -> list[str]:
    """The columns that batches are made of."""
    return [name for name in rows.column_names if not name.startswith(NON_INPUT_PREFIX)]


def row_lengths(task: Task, rows: Dataset) -> Ints:
    """Return the length of each row, in the task's `unit`, int32."""
    return np.asarray(task.lengths(rows), np.int32)


def longest_first(lengths: Sequence[int] | Ints) -> list[int]:
    """Return all rows by decreasing length, so that neighbors need little padding."""
    # stable: rows of equal length keep their order on every machine
    return np.argsort(-np.asarray(lengths), kind="stable").tolist()


def to_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """Copy the tensors of a batch to `device`, asynchronously from page-locked memory."""
    return send_to_device(batch, device, non_blocking=True)


def without_labels(batch: Batch) -> Batch:
    """Return the batch with a valid label everywhere, for a forward pass of weight 0.

    The mean loss over no label would be NaN, and stays NaN when it is multiplied by 0.
    """
    return {k: torch.zeros_like(v) if k == "labels" else v for k, v in batch.items()}


def digest(rows: "Dataset | StreamedRows") -> str:
    """Hash the number of rows and a thousand of them; of a stream, the first hundred.

    It tells a resumed run whether its training examples have changed.
    """
    if not isinstance(rows, Dataset):
        rows = rows.first_rows(100)
    sample = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLED)))  # evenly spaced
    hasher = hashlib.sha256(str(len(rows)).encode())
    names = sorted(batched(rows))
    for arrays in zip(*(arrays_of(sample.select_columns([n])) for n in names), strict=True):
        for name, array in zip(names, arrays, strict=True):
            # dtype and shape are hashed: bytes alone are ambiguous
            hasher.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hasher.hexdigest()


def arrays_of(column: Dataset) -> Iterator[np.ndarray]:
    """The values of a dataset's only column, as its format "numpy" has them."""
    for start in range(0, len(column), AT_ONCE):
        rows = column.select(range(start, min(start + AT_ONCE, len(column))))
        numbers = numbers_of(rows)
        if numbers is None:
            numbers = (np.asarray(row[name]) for row in rows.with_format("numpy") for name in row)
        yield from numbers


def numbers_of(column: Dataset) -> Iterable[np.ndarray] | None:
    """The same for numbers, and lists of them as int64 or float32; None for other values.

    The format itself takes a tenth of a millisecond per row.
    """
    (kind,) = column.features.arrow_schema.types
    in_lists = types.is_list(kind)
    number = kind.value_type if in_lists else kind
    if not types.is_integer(number) and not types.is_floating(number):
        return None
    (chunks,) = column.with_format("arrow")[:].columns
    values = chunks.combine_chunks()
    flat = values.flatten() if in_lists else values
    if values.null_count or flat.null_count:
        return None
    if not in_lists:
        return map(np.asarray, flat.to_numpy())
    dtype = np.int64 if types.is_integer(number) else np.float32
    ends = np.cumsum(values.value_lengths().to_numpy())
    return np.split(flat.to_numpy().astype(dtype), ends[:-1])


class FirstBatches:
    """Train batches on the device for methods that need data before training; reiterable.

    Args:
        rank, processes: of the parts of each batch, the one to take; by default all of it.
    """

    def __init__(
        self,
        splits: Splits,
        settings: TrainConfig,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.splits, self.device, self.workers = splits, device, settings.num_workers
        sampler = splits.mixed.sampler(settings, 0, rank, processes)
        # one epoch, whatever the length of the run
        self.sampler = replace(sampler, steps=sampler.steps_per_epoch)

    def __len__(self) -> int:
        return sum(
            self.sampler.num_micro_batches(step) for step in range(1, self.sampler.steps + 1)
        )

    def __iter__(self) -> Iterator[Batch]:
        rows, collate = self.splits.train, self.splits.collate
        return load(rows, collate, self.sampler, self.device, self.workers)


# Warnings about splits

NAMED = 5  # classes that a message names


def warn_about_truncation(task: Task, processor: Processor, raw: Dataset, encoded: Dataset) -> None:
    """Log how many test rows are truncated, and so scored by their beginning.

    Args:
        raw: the test rows before encoding.
        encoded: the same after encoding.
    """
    whole = task.untruncated()
    # tokens of the parts of a row, at which it may have been truncated: a text, or also its target
    parts = getattr(task, "limits", [getattr(task, "max_target_length", np.inf)])
    limit = min(task.max_length, *parts) if whole else np.inf
    if whole is None or max(task.lengths(encoded), default=0) < limit:
        return  # no row is as long as the limit: nothing to encode again
    count = sum(task.is_truncated(row) for row in encode_once(whole, processor, raw))
    if count:
        logger.warning(
            "%d of %d test examples are truncated to data.max_length=%d tokens: their scores are "
            "those of what is left",
            count,
            len(raw),
            task.max_length,
        )


def warn_about_labels(task: Task, splits: Mapping[str, Dataset | None]) -> None:
    """Log splits whose labels are all the same, and classes that are scored but never trained.

    Args:
        splits: encoded rows by name: training, if they are no stream, validation, test.
    """
    if not isinstance(task, SingleLabelTask) and task.name != REGRESSION:
        return
    labels = {
        name: np.asarray([*values_of(rows, "labels")]) for name, rows in splits.items() if rows
    }
    present = {name: np.unique(values) for name, values in labels.items()}
    for name, values in present.items():
        if len(values) == 1:
            count = len(labels[name])
            logger.warning(
                "all %d %s examples have the label %s: %s",
                count,
                name,
                task.label_text({"labels": values[0]}),
                "there is nothing to learn" if name == "training" else of_one_label(task, count),
            )
    if "training" in present and isinstance(task, SingleLabelTask):
        for name in present.keys() - {"training"}:
            unseen = np.setdiff1d(present[name], present["training"])
            if len(unseen):
                classes = ", ".join(repr(task.classes[i]) for i in unseen[:NAMED])
                count = int(np.isin(labels[name], unseen).sum())
                logger.warning(
                    "%d %s examples have a class without training examples (%s%s)",
                    count,
                    name,
                    classes,
                    ", ..." if len(unseen) > NAMED else "",
                )


def of_one_label(task: Task, count: int) -> str:
    """What scores on examples with one and the same label do not say."""
    if task.name == REGRESSION:
        return "a correlation is undefined, and counts as 0"
    few = "a single example" if count == 1 else "examples of one class"
    return f"scores on {few} do not show whether classes are told apart"
