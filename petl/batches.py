"""Which rows meet in which optimizer step, the same for any number of processes.

Epoch e visits the train rows in an order drawn from the seed and e alone. Step s takes the next
`batch_size` of them, whoever computes them: each process takes every n-th row of the step and cuts
its share into micro-batches. So one process with accumulation and several processes see the same
steps, and a run resumes at any step without visiting those before it.

With `train.buckets` the rows of a step are of similar length, the longest first, so that shares are
as heavy and micro-batches pad little; which rows and which steps come when is drawn as before.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from petl.data.lengths import Buckets, Ints, drawing, permuted
from petl.deaths import obey_owner_alone
from petl.errors import InputError
from petl.settings import TrainConfig
from petl.tasks import Task

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[dict[str, Any]]], Batch]
SPLIT_SEED = 13  # one for all runs: scores of different seeds are about the same held-out rows


@dataclass(frozen=True)
class Splits:
    """The encoded rows of a run, and what they mean."""

    task: Task
    collate: Collate
    train: Dataset
    validation: Dataset | None  # held out from train; only training decisions look at it
    test: Dataset
    buckets: Buckets | None = None  # of the train rows; None: rows of any length meet in a step

    def plan(
        self, settings: TrainConfig, done: int = 0, rank: int = 0, processes: int = 1
    ) -> "Plan":
        """The steps after `done` of a run with these settings, for one of its processes."""
        plan = Plan(
            rows=len(self.train),
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
            for `train.max_tokens`.
    """
    task = data.task
    with accelerator.main_process_first():  # the others then read what it wrote
        train, test = task.encode(processor, data.train), task.encode(processor, data.test)
    train, validation = hold_out(train, settings.held_out)
    multiple = 1 if accelerator.device.type == "cpu" else 8  # suits tensor cores
    collate, buckets = task.collate(processor, multiple), None
    if settings.buckets is not None:
        lengths, size = row_lengths(task, train), settings.batch_size
        buckets = Buckets(lengths, settings.buckets, size, settings.max_tokens)
    splits = Splits(task, collate, train, validation, test, buckets)
    settings.warmup_steps(splits.plan(settings).steps)  # refused before a model is loaded
    return splits


def hold_out(rows: Dataset, share: float) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, and `share` of all rows, drawn once and for all, that are not."""
    if not share:
        return rows, None
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise InputError(
            f"{len(rows)} train rows are too few to hold out train.validation_share={share:g}"
        )
    order = permutation(len(rows), SPLIT_SEED, 0)
    return rows.select(order[count:]), rows.select(order[:count])


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """An order of `count` rows that depends on nothing but the arguments."""
    return permuted(count, drawing(seed, epoch)).tolist()


@dataclass(frozen=True)
class Plan:
    """The rows of each step, for process `rank` of `processes`.

    A batch sampler for DataLoader: iterating gives the micro-batches of all steps after `done`, one
    after the other. `pieces` says how many of them a step has.
    """

    rows: int
    batch_size: int
    micro_batch_size: int | None
    steps: int
    seed: int
    done: int = 0
    rank: int = 0
    processes: int = 1
    buckets: Buckets | None = None  # they then decide how many rows a step has

    @property
    def steps_per_epoch(self) -> int:
        if self.buckets is not None:
            return len(self.buckets.sizes)
        return math.ceil(self.rows / self.batch_size)

    def global_batches(self) -> Iterator[list[int]]:
        """The rows of each step after `done`, over all processes."""
        batches: list[list[int]] = []
        for step in range(self.done, self.steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0 or not batches:
                batches = self.epoch(epoch)
            yield batches[index]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch, counted from 0."""
        if self.buckets is not None:
            return [rows.tolist() for rows in self.buckets.batches(self.seed, epoch)]
        return chunks(permutation(self.rows, self.seed, epoch), self.batch_size)

    def share(self, batch: list[int]) -> list[list[int]]:
        """This process's micro-batches of one step, as many as every other process has.

        Where its rows do not suffice it computes the first row of all instead, which must get no
        weight (`spares`): methods may exchange figures in each forward pass.
        """
        mine = batch[self.rank :: self.processes]
        pieces = chunks(mine, self.micro_batch_size or max(1, len(mine)))
        most = self.pieces_of(math.ceil(len(batch) / self.processes))
        return pieces + [batch[:1]] * (most - len(pieces))

    def spares(self, step: int) -> int:
        """How many of this process's micro-batches of step `step`, from 1, get no weight.

        They are the last ones.
        """
        mine = math.ceil(max(0, self.size(step) - self.rank) / self.processes)
        return self.pieces(step) - self.pieces_of(mine)

    def size(self, step: int) -> int:
        """Rows of step `step`, from 1, over all processes; the last of an epoch may be short."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        if self.buckets is not None:
            return int(self.buckets.sizes[self.buckets.step_order(self.seed, epoch)[index]])
        return min(self.batch_size, self.rows - index * self.batch_size)

    def pieces(self, step: int) -> int:
        """How many micro-batches each process computes in step `step`, from 1."""
        return self.pieces_of(math.ceil(self.size(step) / self.processes))

    def pieces_of(self, rows: int) -> int:
        return math.ceil(rows / (self.micro_batch_size or max(1, rows)))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            yield from self.share(batch)


def load(
    rows: Dataset,
    collate: Collate,
    batches: Iterable[list[int]],
    device: torch.device,
    workers: int,
) -> Iterator[Batch]:
    """The batches as CPU tensors, page-locked where that speeds up the copy to `device`."""
    loader = DataLoader(
        rows,  # ty: ignore[invalid-argument-type]
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=obey_owner_alone,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the generator of the dropout masks
    )
    return iter(loader)


def row_lengths(task: Task, rows: Dataset) -> Ints:
    """How long each row is, in the task's `unit`, int32."""
    return np.asarray(task.lengths(rows), np.int32)


def longest_first(lengths: Sequence[int] | Ints) -> list[int]:
    """All rows by falling length, so that neighbours need little padding."""
    return np.argsort(-np.asarray(lengths), kind="stable").tolist()


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; the copy may still be under way when this returns."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def without_labels(batch: Batch) -> Batch:
    """The batch with some valid label everywhere, for a forward pass that is to count nothing.

    The mean loss over no label at all would be NaN, and stays NaN when it is multiplied by 0.
    """
    return {**batch, "labels": torch.zeros_like(batch["labels"])}


def digest(rows: Dataset) -> str:
    """A hash of a thousand rows spread over the data set, and of their number."""
    some = rows.select(range(0, len(rows), max(1, len(rows) // 1000))).with_format("numpy")
    hasher = hashlib.sha256(str(len(rows)).encode())
    for row in some:
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
        return sum(self.plan.pieces(step) for step in range(1, self.plan.steps + 1))

    def __iter__(self) -> Iterator[Batch]:
        rows, collate = self.splits.train, self.splits.collate
        for batch in load(rows, collate, self.plan, self.device, self.workers):
            yield to_device(batch, self.device)
