"""Estimate how much padding length buckets save on the training data of a configuration."""

from dataclasses import replace

from omegaconf import DictConfig

from petl.core.types import Record
from petl.data.base import as_dataset, read_data
from petl.data.batch_sampler import Ints, chunks, padding_fraction, permutation
from petl.data.models.loading import load_processor
from petl.data.refused_rows import encode_usable
from petl.training.dataloader import buckets_of, row_lengths
from petl.training.runs.settings import TrainConfig, read_train

STREAM_ROWS = 10_000  # rows of a stream that are read (assumption: their lengths represent it)


def estimate(cfg: DictConfig) -> Record:
    """Return `describe` for the training data of a configuration, truncated as in training.

    Raises:
        InputError: data, model or settings are invalid.
    """
    settings = read_train(cfg)
    data = read_data(cfg.data)
    processor = load_processor(cfg.model, data.task)
    _, (rows,) = encode_usable(data, processor, lambda data: [as_dataset(data, STREAM_ROWS)])
    return describe(row_lengths(data.task, rows), settings)


def describe(lengths: Ints, settings: TrainConfig) -> Record:
    """Describe the length buckets of rows of these lengths, as plain values for YAML.

    Keys: `rows`; `tokens`; `edges` (for `BucketBatchSampler`); `buckets` (for each its longest row
    in tokens, number of rows and batch size); `steps` and `padding` (fraction of the positions that
    one process computes in the first epoch), each `before` (without buckets) and `after`.
    """
    if settings.buckets is None and settings.batch_sizes is None:
        settings = replace(settings, buckets="auto")
    # where auto makes none, one for all lengths
    buckets = buckets_of(lengths, settings) or buckets_of(lengths, replace(settings, buckets=1))
    assert buckets is not None
    # the order of a run without buckets, in the first epoch
    order = chunks(permutation(len(lengths), settings.seed, 0), settings.batch_size)
    longest = [int(lengths[rows].max()) for rows in buckets.rows]
    entries = zip(longest, buckets.rows, buckets.steps, strict=True)
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "edges": sorted(set(longest[:-1])),  # buckets may end at the same length
        "buckets": [
            {"longest": length, "rows": len(rows), "batch_size": min(size, len(rows))}
            for length, rows, size in entries
        ],
        "steps": {"before": len(order), "after": len(buckets.sizes)},
        "padding": {
            "before": round(padding_fraction(lengths, order), 4),
            "after": round(padding_fraction(lengths, buckets.batches(settings.seed, 0)), 4),
        },
    }
