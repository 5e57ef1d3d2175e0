"""The encoded rows of a run, and how they come as batches: parted, collated, on the device."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from petl.data.batch_sampler import SequentialStepSampler, StepSampler, permutation
from petl.data.buckets import Buckets, Ints
from petl.data.streaming import Stream, StreamedRows
from petl.distributed.processes import ignore_foreign_signals
from petl.errors import InputError
from petl.runs.settings import TrainConfig
from petl.tasks.base import Task
from petl.tasks.rows import NON_INPUT_PREFIX

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[dict[str, Any]]], Batch]
logger = logging.getLogger(__name__)
OF_WORKER = re.compile(r"Caught .* in DataLoader worker.*\n[\w.]+: (.*)\n", re.DOTALL)
SPLIT_SEED = 13  # one for all runs: scores of different seeds are about the same held-out rows


@dataclass(frozen=True)
class Splits:
    """The encoded rows of a run, and what they mean."""

    task: Task
    collate: Collate
    train: Dataset | StreamedRows
    validation: Dataset | None  # held out from train; only training decisions look at it
    test: Dataset
    processor: Any  # that made them
    buckets: Buckets | None = None  # of the train rows; None: rows of any length meet in a step

    @property
    def known(self) -> Dataset:
        """The train rows, which must not be a stream."""
        assert not isinstance(self.train, StreamedRows), "refused before"
        return self.train

    def plan(
        self, settings: TrainConfig, done: int = 0, rank: int = 0, processes: int = 1
    ) -> StepSampler:
        """The steps after `done` of a run with these settings, for one of its processes."""
        if isinstance(self.train, StreamedRows):
            kind, rows = SequentialStepSampler, (settings.steps or 0) * settings.batch_size
        else:
            kind, rows = StepSampler, len(self.train)
        plan = kind(
            rows=rows,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            steps=0,
            seed=settings.seed,
            done=done,
            rank=rank,
            processes=processes,
            buckets=self.buckets,
        )
        return replace(plan, steps=settings.steps_of_run(plan.steps_per_epoch))


def encode_splits(
    data: Any, processor: Any, settings: TrainConfig, accelerator: Accelerator
) -> Splits:
    """Encode what `read_data` gave and hold out validation rows if evaluation is to steer.

    `processor` is what `load_processor` gives for the model and the task.

    Raises:
        InputError: too few rows to hold any out, too few steps for the warm-up, or a row too long
            for `train.max_tokens` or `train.batch_sizes`.
    """
    task = data.task
    if isinstance(data.train, Stream):
        return stream_splits(data, processor, settings, accelerator)
    with accelerator.main_process_first():  # the others then read what it wrote
        train, test = task.encode(processor, data.train), task.encode(processor, data.test)
    train, validation = hold_out(train, settings.held_out, task.group)
    multiple = 1 if accelerator.device.type == "cpu" else 8  # suits tensor cores
    buckets = buckets_of(row_lengths(task, train), settings) if settings.bucketed else None
    collate = task.collate(processor, multiple)
    splits = Splits(task, collate, train, validation, test, processor, buckets)
    settings.warmup_steps(splits.plan(settings).steps)  # refused before a model is loaded
    return splits


def stream_splits(
    data: Any, processor: Any, settings: TrainConfig, accelerator: Accelerator
) -> Splits:
    """What `encode_splits` gives for train rows that are read as they are needed.

    Raises:
        InputError: a setting that needs to know all train rows.
    """
    if settings.steps is None:
        raise InputError(
            "data.streaming=true leaves the number of rows unknown: say train.steps=N in place of "
            "epochs"
        )
    if settings.bucketed or settings.validation_share is not None:
        raise InputError(
            "train.buckets, train.batch_sizes and train.validation_share need the lengths or "
            "number of all rows, which data.streaming=true leaves unknown; data.held_rows says how "
            "many are held out"
        )
    task, stream = data.task, data.train
    if settings.num_workers > 1 and not task.one_for_one:
        logger.warning(
            "each of train.num_workers=%d encodes the whole stream: 1 is as fast",
            settings.num_workers,
        )
    held = stream.held if settings.eval_steps is not None else 0
    recent = settings.batch_size  # a step may come back to its first row
    train = StreamedRows(stream, task, processor, settings.seed, recent, held)
    with accelerator.main_process_first():
        test = task.encode(processor, data.test)
    collate = task.collate(processor, 1 if accelerator.device.type == "cpu" else 8)
    validation = train.held_out() if held else None
    splits = Splits(task, collate, train, validation, test, processor)
    settings.warmup_steps(settings.steps)
    return splits


def buckets_of(lengths: Ints, settings: TrainConfig) -> Buckets:
    """The buckets that `train.buckets` or `train.batch_sizes` makes of rows of these lengths.

    Raises:
        InputError: a row too long for them.
    """
    if settings.batch_sizes is not None:
        return Buckets.of_batch_sizes(lengths, settings.batch_sizes)
    assert settings.buckets is not None, "asked before"
    limits = settings.batch_size, settings.max_tokens, settings.quadratic
    return Buckets.of_equal_tokens(lengths, settings.buckets, *limits)


def hold_out(
    rows: Dataset, share: float, group: str | None = None
) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, and `share` of all rows, drawn once and for all, that are not.

    With `group`, the name of a column, all rows that share a value there are on one side, and the
    share is that of the values.
    """
    if not share:
        return rows, None
    values = np.arange(len(rows)) if group is None else np.asarray(rows[group])
    there = np.unique(values)
    count = max(1, round(share * len(there)))
    if count >= len(there):
        raise InputError(
            f"{len(there)} train rows are too few to hold out train.validation_share={share:g}"
        )
    order = permutation(len(there), SPLIT_SEED, 0)
    if group is None:
        return rows.select(order[count:]), rows.select(order[:count])
    held = np.isin(values, there[order[:count]])
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def load(
    rows: Dataset | StreamedRows,
    collate: Collate,
    batches: Iterable[list[int]],
    device: torch.device,
    workers: int,
) -> Iterator[Batch]:
    """The batches as CPU tensors, page-locked where that speeds up the copy to `device`.

    Raises:
        InputError: a row cannot be read, be it by a worker.
    """
    if isinstance(rows, StreamedRows):
        wanted: Any = rows.restarted()
    else:
        wanted = rows.select_columns(batched(rows))
    loader = DataLoader(
        wanted,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_foreign_signals,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the generator of the dropout masks
    )
    return in_own_words(iter(loader))


def in_own_words(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; what is wrong with a row is told as in the worker, without a traceback."""
    try:
        yield from batches
    except InputError as error:
        told = OF_WORKER.fullmatch(str(error))
        if told is None:
            raise
        raise type(error)(told[1]) from error


def batched(rows: Dataset) -> list[str]:
    """The columns that batches are made of."""
    return [name for name in rows.column_names if not name.startswith(NON_INPUT_PREFIX)]


def row_lengths(task: Task, rows: Dataset) -> Ints:
    """How long each row is, in the task's `unit`, int32."""
    return np.asarray(task.lengths(rows), np.int32)


def longest_first(lengths: Sequence[int] | Ints) -> list[int]:
    """All rows by falling length, so that neighbours need little padding."""
    return np.argsort(-np.asarray(lengths), kind="stable").tolist()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; the copy may still be under way when this returns."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def without_labels(batch: Batch) -> Batch:
    """The batch with some valid label everywhere, for a forward pass that is to count nothing.

    The mean loss over no label at all would be NaN, and stays NaN when it is multiplied by 0.
    """
    return {k: torch.zeros_like(v) if k == "labels" else v for k, v in batch.items()}


def digest(rows: Dataset | StreamedRows) -> str:
    """A hash of a thousand rows spread over the data set, and of their number; of a stream, of the
    first hundred in the order of training.
    """
    if isinstance(rows, StreamedRows):
        rows = rows.first_rows(100)
    some = rows.select(range(0, len(rows), max(1, len(rows) // 1000))).with_format("numpy")
    hasher = hashlib.sha256(str(len(rows)).encode())
    for row in some.select_columns(batched(rows)):
        for name, value in sorted(row.items()):
            array = np.asarray(value)
            hasher.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hasher.hexdigest()


class FirstBatches:
    """Train batches on the device for methods that look at data first; any number of passes."""

    def __init__(self, splits: Splits, settings: TrainConfig, device: torch.device) -> None:
        self.splits, self.device, self.workers = splits, device, settings.num_workers
        plan = splits.plan(settings)
        self.plan = replace(plan, steps=plan.steps_per_epoch)

    def __len__(self) -> int:
        return sum(self.plan.num_micro_batches(step) for step in range(1, self.plan.steps + 1))

    def __iter__(self) -> Iterator[Batch]:
        rows, collate = self.splits.train, self.splits.collate
        for batch in load(rows, collate, self.plan, self.device, self.workers):
            yield to_device(batch, self.device)
