"""For each bucket of length, the rows of the largest step that the memory has room for.

On a GPU steps are tried. Elsewhere, or for a device that is not here, what they need is counted
from shapes, as `petl plan` does: weights, AdamW's moments, a copy of the gradients beside them, and
the pass of so many rows as long as the bucket's longest.
"""

import math
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from petl import losses
from petl.core.dry_run import pass_memory, without_values
from petl.core.lifecycle import lifecycle
from petl.core.parameters import trainable
from petl.core.registry import build_config
from petl.data.bucketing import distinct
from petl.data.buckets import Buckets, Ints, bucket_edges, split_by
from petl.data.streaming import refuse_stream
from petl.distributed.engine import on_device
from petl.distributed.launch import alone, number_of_processes, start
from petl.errors import InputError
from petl.models.loading import load_base, load_processor
from petl.planning.batch_search import SHARE, Trials, largest, put_back, share_of_memory
from petl.planning.bucket_estimate import BUCKETS
from petl.planning.memory import optimizer_bytes, weight_bytes
from petl.planning.plan import model_on_shapes, storage_of
from petl.runs.environment import device_name
from petl.runs.run_config import RunConfig, read_config
from petl.runs.settings import TrainConfig
from petl.training.dataloader import (
    Batch,
    FirstBatches,
    Splits,
    batched,
    encode_splits,
    row_lengths,
)
from petl.training.optimizer import make_engine, make_optimizer
from petl.training.wrapping import (
    check_model,
    for_training,
    sized_fields,
    wrap_arguments,
    wrap_for_run,
)

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Fits = Callable[[Batch], bool]


def bytes_of(text: str) -> int:
    """The number of bytes that "8GB" or "7.5 GiB" means.

    Raises:
        InputError: it means none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if found is None or found[2].upper() not in UNITS:
        raise InputError(f"{text!r} is no amount of memory such as 8GB or 7.5GiB")
    return round(float(found[1]) * UNITS[found[2].upper()])


def find(cfg: DictConfig, memory: int | None = None) -> dict[str, Any]:
    """The buckets of the train rows and the rows of their steps, as YAML takes it.

    `edges` are for `BucketBatchSampler`. `buckets` has, for each: its longest row and its rows
    (tokens and number), the rows of a step over all processes and the tokens that they are, padded.
    A process has `memory` bytes, of which `SHARE` was to suffice. `steps` are those of an epoch.

    Args:
        cfg: of the run, which has as many processes as WORLD_SIZE says.
        memory: bytes of the device of each; None: of the one that is here.

    Raises:
        InputError: whatever would stop that run before training; a setting that leaves nothing to
            find; not even one row has room.
    """
    config = read_config(cfg)
    settings = config.train
    refuse_limits(settings)
    with alone():  # one process tries for all
        accelerator = start(settings.seed, config.precision)
    data = config.data.read()
    refuse_stream(data.train, "a search for batch sizes")
    splits = encode_splits(data, load_processor(config.model, data.task), settings, accelerator)
    here = accelerator.device
    is_tried = memory is None and here.type == "cuda"
    if memory is None:
        memory = memory_of_device(here)
    if is_tried:
        opened = tried(config, splits, accelerator)
    else:
        opened = counted(config, splits, here, memory)
    lengths, processes = row_lengths(splits.task, splits.known), number_of_processes()
    parts = buckets_of_equal_share(lengths, settings.buckets or BUCKETS)
    with opened as fits:
        first = max(1, settings.batch_size // processes)
        shares = search(splits, lengths, parts, fits, first, processes)
    found = [
        Bucket(int(lengths[rows[-1]]), len(rows), min(share * processes, len(rows)))
        for rows, share in zip(parts, shares, strict=True)
    ]
    return {
        "processes": processes,
        "memory": memory,
        "measured": f"{'tried' if is_tried else 'counted'} on {device_name(here)}",
        "rows": len(lengths),
        "edges": [bucket.longest for bucket in found[:-1]],
        "buckets": [bucket.entry() for bucket in found],
        "steps": len(Buckets.by_size(lengths, {b.longest: b.batch_size for b in found}).sizes),
    }


@dataclass(frozen=True)
class Bucket:
    """Rows of up to `longest` tokens, `rows` in all, `batch_size` in a step."""

    longest: int
    rows: int
    batch_size: int

    def entry(self) -> dict[str, int]:
        return {**vars(self), "tokens": self.batch_size * self.longest}


def refuse_limits(settings: TrainConfig) -> None:
    """Raise InputError for settings by which no step would be too large, or that are the answer."""
    for name in ("micro_batch_size", "max_tokens", "batch_sizes"):
        value = getattr(settings, name)
        if value is not None:
            raise InputError(f"train.{name}={value} limits passes already; leave it out")


def memory_of_device(device: torch.device) -> int:
    """Bytes of a GPU; without one, those of the machine that no other process holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().available


# Buckets


def buckets_of_equal_share(lengths: Ints, count: int) -> list[Ints]:
    """The rows of each bucket, by rising length; at most `count` buckets, of about equal sums."""
    edges = distinct(bucket_edges(lengths, count), int(lengths.max()))
    order = lengths.argsort(kind="stable").astype("i4")
    return [rows for rows in split_by(edges, lengths, order) if len(rows)]


def search(
    splits: Splits, lengths: Ints, parts: Sequence[Ints], fits: Fits, first: int, processes: int
) -> list[int]:
    """Rows of the largest pass of one process, for each bucket; no more than its share of them.

    Each search starts where the one of the next longer bucket suggests, the first of all at
    `first` rows.

    Raises:
        InputError: one row has no room.
    """
    shares: list[int] = []
    tokens = 0  # of the largest pass so far
    for rows in reversed(parts):
        longest, most = int(lengths[rows[-1]]), math.ceil(len(rows) / processes)
        one = splits.collate([longest_of_each(splits, rows)])
        guess = max(1, tokens // longest) if tokens else first
        share = largest(lambda n, one=one: fits(repeated(one, n)), min(guess, most), most)
        if share == 0:
            raise InputError(
                f"not even one row of {longest} {splits.task.unit} has room: cut rows with "
                "data.max_length, or try train.gradient_checkpointing=true or another "
                "model.dtype or model.quantization"
            )
        tokens = max(tokens, share * longest)
        shares.append(share)
    return shares[::-1]


def longest_of_each(splits: Splits, numbers: Ints) -> dict[str, Any]:
    """A row with the longest list that any of these train rows has in each column.

    Args:
        numbers: of the rows, by rising length.
    """
    some = splits.known.select_columns(batched(splits.known)).select(numbers)
    made = some[len(some) - 1]
    if splits.task.reads_text:  # images and sounds are of one size
        for name, value in made.items():
            if isinstance(value, list):
                made[name] = max([value, *some[name]], key=len)
    return made


def repeated(one: Batch, count: int) -> Batch:
    """A batch of `count` times the one row of a batch."""
    return {name: t.expand(count, *t.shape[1:]).contiguous() for name, t in one.items()}


# Whether a batch has room


@contextmanager
def counted(
    config: RunConfig, splits: Splits, device: torch.device, memory: int
) -> Generator[Fits]:
    """Count the bytes of steps from shapes, against `SHARE` of `memory`."""
    fields = sized_fields(config, splits.task, splits.sampler(config.train).steps)
    model, _ = model_on_shapes(config, splits.task, fields)
    storage = storage_of(config, splits.task, build_config(**fields))
    bf16 = config.precision == "bf16"
    with without_values(model, device), for_training(model, config.train):
        copies = sum(tensor.nbytes for _, tensor in trainable(model))
        fixed = sum(weight_bytes(model, storage)) + optimizer_bytes(model, storage) + copies
        room = SHARE * memory - fixed

        def fits(batch: Batch) -> bool:
            model.zero_grad()  # of the pass before, which this one makes anew
            return pass_memory(model, batch, device, bf16=bf16).peak <= room

        yield fits


@contextmanager
def tried(config: RunConfig, splits: Splits, accelerator: Accelerator) -> Generator[Fits]:
    """Make steps of the run's model on the device, which may run out of `SHARE` of its memory.

    What a method does between steps (growing ranks, choosing a mask) is left out.
    """
    launch, settings = config.launch, config.train
    if launch.name != "ddp":
        raise InputError(
            f"launch={launch.name} shares memory among processes, which one alone cannot try: say "
            "--memory with that of one device, and it is counted"
        )
    arguments = wrap_arguments(config, splits, accelerator)
    base = load_base(config.model, splits.task, processor=splits.processor)
    model = wrap_for_run(on_device(base, accelerator), arguments, settings)
    losses.attach(model, config.loss)
    check_model(model, settings)
    device = accelerator.device
    with share_of_memory(device), for_training(model, settings):
        life = lifecycle(model)
        life.prepare(FirstBatches(splits, settings, device))
        optimizer = make_optimizer(model, settings, life)
        engine = make_engine(model, optimizer, settings.max_grad_norm, accelerator)
        with put_back(model, optimizer, device):
            yield Trials(engine).fits
        engine.release()
