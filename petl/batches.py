"""Which rows meet in which optimizer step, the same for any number of processes.

Epoch e visits the train rows in an order drawn from the seed and e alone. Step s takes the next
`batch_size` of them, whoever computes them: each process takes every n-th row of the step and cuts
its share into micro-batches. So one process with accumulation and several processes see the same
steps, and a run resumes at any step without visiting those before it.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

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


def encode_splits(
    data: Any, processor: Any, settings: TrainConfig, accelerator: Accelerator
) -> Splits:
    """Encode what `read_data` gave and hold out validation rows if evaluation is to steer.

    `processor` is what `load_processor` gives for the model and the task.

    Raises:
        InputError: too few rows to hold any out, or too few steps for the warm-up.
    """
    task = data.task
    with accelerator.main_process_first():  # the others then read what it wrote
        train, test = task.encode(processor, data.train), task.encode(processor, data.test)
    train, validation = hold_out(train, settings.held_out)
    settings.warmup_steps(settings.total_steps(len(train)))  # refused before a model is loaded
    multiple = 1 if accelerator.device.type == "cpu" else 8  # suits tensor cores
    return Splits(task, task.collate(processor, multiple), train, validation, test)


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
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


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

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def global_batches(self) -> Iterator[list[int]]:
        """The rows of each step after `done`, over all processes."""
        order: list[int] = []
        for step in range(self.done, self.steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0 or not order:
                order = permutation(self.rows, self.seed, epoch)
            yield order[index * self.batch_size : (index + 1) * self.batch_size]

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
        index = (step - 1) % self.steps_per_epoch
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
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the generator of the dropout masks
    )
    return iter(loader)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """All rows by falling length, so that neighbours need little padding."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


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
        self.splits, self.settings, self.device = splits, settings, device
        self.size = settings.micro_batch_size or settings.batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.splits.train) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        rows, settings = self.splits.train, self.settings
        plan = Plan(len(rows), self.size, None, len(self), settings.seed)
        for batch in load(rows, self.splits.collate, plan, self.device, settings.num_workers):
            yield to_device(batch, self.device)
