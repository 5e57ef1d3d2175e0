"""Find the largest batch size that fits into memory, for each length bucket of the training data.

On a GPU, by trial steps. On a CPU, or for another device, from tensor shapes as `petl plan` does:
weights, the optimizer's state, a second copy of the gradients, and a pass whose rows all have the
length of the bucket's longest.
"""

import math
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from petl.core.lifecycle import lifecycle
from petl.core.parameters import trainable
from petl.core.tuners.gradients import updated
from petl.core.types import Record
from petl.data.base import read_from, refuse_stream
from petl.data.batch_sampler import Buckets, Ints, split_by
from petl.data.bucketing import bucket_edges, distinct
from petl.data.models.loading import load_base, load_processor
from petl.data.tasks.base import Row
from petl.errors import InputError, shown
from petl.experiments.planning.batch_search import (
    MEMORY_FRACTION,
    StepTrials,
    largest,
    limited_memory,
    restored,
)
from petl.experiments.planning.dry_run import pass_memory, without_values
from petl.experiments.planning.memory import optimizer_state, weight_bytes
from petl.experiments.planning.shapes import model_on_shapes, storage_of
from petl.system.progress import ProgressItems
from petl.training.dataloader import (
    Batch,
    FirstBatches,
    Splits,
    batched,
    encode_splits,
    row_lengths,
)
from petl.training.distributed.launch import alone, number_of_processes, start
from petl.training.evaluate import for_training
from petl.training.features import Setup, features_of
from petl.training.optimizer import make_engine, make_optimizer
from petl.training.runs.config import RunConfig
from petl.training.runs.environment import device_name
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import TrainConfig
from petl.training.wrapping import wrapped

BUCKETS = 30  # of a search where train.buckets is null or auto
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Fits = Callable[[Batch], bool]


def bytes_of(text: str) -> int:
    """Parse an amount of memory such as "8GB" or "7.5 GiB"; return bytes.

    Raises:
        InputError: it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS:
        raise InputError(f"{text!r} is not an amount of memory; write it like 8GB or 7.5GiB")
    amount = float(match[1]) * UNITS[match[2].upper()]
    if amount >= 2**63:
        raise InputError(f"{shown(text)} is more memory than any device has")
    return round(amount)


def find(cfg: DictConfig, memory: int | None = None) -> Record:
    """Find the length buckets and batch sizes of a run; return them as plain values for YAML.

    Keys: `processes`; `memory` (bytes per process, of which `MEMORY_FRACTION` was used);
    `measured` (how and on which device); `rows`; `edges` (for `BucketBatchSampler`); `buckets`
    (for each its longest row in tokens, number of rows, global batch size, and padded tokens of a
    step); `steps` (per epoch).

    Args:
        cfg: the run's configuration; the number of processes is WORLD_SIZE.
        memory: bytes of the device of each process; None: those of the device of this machine.

    Raises:
        InputError: an error that would stop the run before training; a setting that leaves nothing
            to find; not even one row fits.
    """
    config = read_config(cfg)
    settings = config.train
    refuse_limits(settings)
    for name in ("order", "sampling"):
        value = getattr(config.data, name, None)
        if value not in (None, "size"):
            raise InputError(
                f"data.{name}={value} decides which rows a step has, so that buckets by length are "
                f"not possible: a search for batch sizes is for a run without data.{name}"
            )
    with alone():  # one process measures for all
        accelerator = start(settings.seed, config.precision)
    data = read_from(config.data)
    refuse_stream(data.train, "a search for batch sizes")  # its lengths are unknown
    unsorted = replace(settings, buckets=None)  # sorted below
    splits = encode_splits(data, load_processor(config.model, data.task), unsorted, accelerator)
    device = accelerator.device
    is_tried = memory is None and device.type == "cuda"
    if memory is None:
        memory = memory_of_device(device)
    if is_tried:
        measure = by_trials(config, splits, accelerator)
    else:
        measure = by_shapes(config, splits, device, memory)
    lengths, processes = row_lengths(splits.task, splits.known), number_of_processes()
    count = BUCKETS if settings.buckets in (None, "auto") else int(settings.buckets)
    parts = equal_buckets(lengths, count)
    with measure as fits:
        # the configured batch size is a plausible first guess
        first = max(1, settings.batch_size // processes)
        sizes = search(splits, lengths, parts, fits, first, processes)
    # a batch larger than its bucket would never be filled
    buckets = [
        BucketPlan(int(lengths[rows[-1]]), len(rows), min(size * processes, len(rows)))
        for rows, size in zip(parts, sizes, strict=True)
    ]
    by_longest = {bucket.longest: bucket.batch_size for bucket in buckets}
    return {
        "processes": processes,
        "memory": memory,
        "measured": f"{'tried' if is_tried else 'counted'} on {device_name(device)}",
        "rows": len(lengths),
        # the last bucket has no upper edge
        "edges": [bucket.longest for bucket in buckets[:-1]],
        "buckets": [bucket.entry() for bucket in buckets],
        "steps": len(Buckets.of_batch_sizes(lengths, by_longest).sizes),
    }


@dataclass(frozen=True)
class BucketPlan:
    """A length bucket: `rows` rows of at most `longest` tokens, `batch_size` of them per step."""

    longest: int
    rows: int
    batch_size: int

    def entry(self) -> dict[str, int]:
        """The bucket as plain values, with the padded tokens of a step."""
        return {**vars(self), "tokens": self.batch_size * self.longest}


def refuse_limits(settings: TrainConfig) -> None:
    """Raise InputError for settings that limit passes themselves, or that are the result."""
    for name in ("micro_batch_size", "max_tokens", "batch_sizes"):
        value = getattr(settings, name)
        if value is not None:
            raise InputError(
                f"train.{name}={value} already limits the size of a pass; leave it out"
            )


def memory_of_device(device: torch.device) -> int:
    """Return the total memory of a GPU; without one, the free memory of the machine; in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().available


# Buckets


def equal_buckets(lengths: Ints, count: int) -> list[Ints]:
    """Split rows by length into at most `count` buckets of about the same number of tokens.

    Returns the row numbers of each bucket, sorted by length.
    """
    edges = distinct(bucket_edges(lengths, count), int(lengths.max()))
    # stable: rows of the same length keep their order, so that the result is reproducible
    order = lengths.argsort(kind="stable").astype("i4")
    return [rows for rows in split_by(edges, lengths, order) if len(rows)]


def search(
    splits: Splits, lengths: Ints, parts: Sequence[Ints], fits: Fits, first: int, processes: int
) -> list[int]:
    """Return the largest number of rows in a pass of one process, for each bucket.

    Limited to the rows of a bucket divided by the number of processes. Buckets are searched from
    the longest on: each search starts at the number of tokens that fitted in the ones before, the
    first at `first` rows.

    Raises:
        InputError: not even one row fits.
    """
    sizes: list[int] = []
    tokens = 0  # of the largest pass that fitted so far
    # longest first: the tokens that fit there are the first guess for the others
    for rows in ProgressItems(parts[::-1], "finding batch sizes", unit="length buckets"):
        longest, maximum = int(lengths[rows[-1]]), math.ceil(len(rows) / processes)
        # batches of copies of one row: all rows as long as the longest is the worst case
        row = longest_row(splits, rows)
        start_size = max(1, tokens // longest) if tokens else first
        start_size = min(start_size, maximum)
        size = largest(lambda n, row=row: fits(splits.collate([row] * n)), start_size, maximum)
        if size == 0:
            raise InputError(
                f"not even one example of {longest} {splits.task.unit} fits: truncate examples "
                "with data.max_length, or try train.gradient_checkpointing=true or another "
                "model.dtype or model.quantization"
            )
        tokens = max(tokens, size * longest)
        sizes.append(size)
    # back to ascending lengths
    return sizes[::-1]


def longest_row(splits: Splits, numbers: Ints) -> Row:
    """Return a row with, in each column, the longest list of any of these training rows.

    Args:
        numbers: row numbers, sorted by length.
    """
    rows = splits.known.select_columns(batched(splits.known)).select(numbers)
    # sorted by length, so the last one is the longest
    longest = rows[len(rows) - 1]
    if splits.task.reads_text:  # images and audio clips all have the same size
        for name, value in longest.items():
            if isinstance(value, list):
                # columns such as labels may be longest in another row
                longest[name] = max([value, *rows[name]], key=len)
    return longest


# Does a batch fit?


@contextmanager
def by_shapes(
    config: RunConfig, splits: Splits, device: torch.device, memory: int
) -> Generator[Fits]:
    """Yield a test that compares the bytes of a step, from its shapes, with `memory`."""
    setup = Setup(load_base, config, splits, features_of(config.resolved))
    model, _ = model_on_shapes(config, splits.task, setup.fields(), setup.when_wrapped)
    storage = storage_of(config, splits.task)
    bf16 = config.precision == "bf16"
    with without_values(model, device), for_training(model, config.train):
        copies = sum(tensor.nbytes for _, tensor in trainable(model))
        # what does not depend on the batch
        state, _ = optimizer_state(model, config.train, storage)
        fixed = sum(weight_bytes(model, storage)) + state + copies
        available = MEMORY_FRACTION * memory - fixed

        def fits(batch: Batch) -> bool:
            model.zero_grad()  # or gradients of the pass before would not count as new
            return pass_memory(model, batch, device, bf16=bf16).peak <= available

        yield fits


@contextmanager
def by_trials(config: RunConfig, splits: Splits, accelerator: Accelerator) -> Generator[Fits]:
    """Yield a test that makes steps of the run's model on the device, with limited memory.

    Updates of a method between steps (growing ranks, choosing a mask) are not made.
    """
    launch, settings = config.launch, config.train
    if launch.name != "ddp":
        raise InputError(
            f"launch={launch.name} shards memory across processes, which a trial in one process "
            "cannot measure: give the memory of one device with --memory to estimate it from shapes"
        )
    model = wrapped(Setup(load_base, config, splits, features_of(config.resolved), accelerator))
    device = accelerator.device
    with limited_memory(device), for_training(model, settings):
        hooks = lifecycle(model)
        hooks.prepare(FirstBatches(splits, settings, device))
        updated(model.base_model)  # no step of a trial is one of training
        optimizer = make_optimizer(model, settings, hooks)
        engine = make_engine(model, optimizer, settings.max_grad_norm, accelerator)
        with restored(model, optimizer, device):
            yield StepTrials(engine).fits
        engine.release()
