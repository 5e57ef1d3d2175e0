"""What buckets of length would save on the rows of a configuration, before anything is trained."""

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from petl.data import as_dataset, read_data
from petl.data.batch_sampler import chunks, permutation
from petl.data.buckets import Ints, padding_fraction
from petl.models.loading import load_processor
from petl.runs.settings import TrainConfig, read_train
from petl.training.dataloader import buckets_of, row_lengths

BUCKETS = 30  # where train.buckets says nothing
STREAM_ROWS = 10_000  # of a stream that are looked at


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """`describe` for the train rows of a configuration, as tokens after truncation.

    Raises:
        InputError: whatever is wrong with data, model or settings.
    """
    settings = read_train(cfg)
    data = read_data(cfg.data)
    rows = data.task.encode(load_processor(cfg.model, data.task), as_dataset(data, STREAM_ROWS))
    return describe(row_lengths(data.task, rows), settings)


def describe(lengths: Ints, settings: TrainConfig) -> dict[str, Any]:
    """The buckets of rows of these lengths, as YAML takes it.

    `buckets` has, for each: its longest row and its rows (tokens and number), and the rows of a
    step. `edges` are for `BucketBatchSampler`. `padding` is the share of positions that one process
    computes for nothing in the first pass over the rows: without buckets, and with them.
    """
    if not settings.bucketed:
        settings = replace(settings, buckets=BUCKETS)
    buckets = buckets_of(lengths, settings)
    order = chunks(permutation(len(lengths), settings.seed, 0), settings.batch_size)
    longest = [int(lengths[rows].max()) for rows in buckets.rows]
    entries = zip(longest, buckets.rows, buckets.steps, strict=True)
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "edges": sorted(set(longest[:-1])),
        "buckets": [
            {"longest": most, "rows": len(rows), "batch_size": min(size, len(rows))}
            for most, rows, size in entries
        ],
        "steps": {"before": len(order), "after": len(buckets.sizes)},
        "padding": {
            "before": round(padding_fraction(lengths, order), 4),
            "after": round(padding_fraction(lengths, buckets.batches(settings.seed, 0)), 4),
        },
    }
