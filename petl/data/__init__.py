"""Data sets: `read_data(cfg.data)` reads and checks the rows before any model is loaded."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from omegaconf import DictConfig

from petl.config.schema import plain, read_fields
from petl.data.base import RawData, Source, Stream
from petl.data.bucketing import BucketBatchSampler
from petl.data.bundled import Digits, Hamlet, Reasoning, WordNet
from petl.data.files import Files
from petl.data.folders import AudioFolder, ImageFolder, Speech
from petl.data.hub import Hub
from petl.errors import InputError, choose
from petl.tasks import TASKS

SOURCES: dict[str, type[Source]] = {
    "wordnet": WordNet,
    "hamlet": Hamlet,
    "reasoning": Reasoning,
    "files": Files,
    "hub": Hub,
    "image_folder": ImageFolder,
    "audio_folder": AudioFolder,
    "digits": Digits,
    "speech": Speech,
}


def read_data(cfg: DictConfig | Mapping[str, Any]) -> RawData:
    """Read the task with its training and test rows, after a check of the settings `cfg`.

    Raises:
        InputError: a setting or a row is wrong.
    """
    return data_source(cfg).read()


def data_source(cfg: DictConfig | Mapping[str, Any]) -> Source:
    """Return the checked settings under `data`; no row is read.

    Raises:
        InputError: an unknown source, task or setting, or a value out of range.
    """
    # a plain dict: sources are dataclasses, which take no DictConfig
    settings = plain(cfg)
    source = settings.get("source")
    if source is None:
        raise InputError(f"data.source is not given; available: {', '.join(sorted(SOURCES))}")
    kind = choose(SOURCES, source, "data source")
    # before the fields: which are allowed depends on the task
    choose(TASKS, settings.get("task", "classification"), "task")
    return read_fields(kind, settings, "data")


def as_dataset(data: RawData, max_rows: int) -> Dataset:
    """The train rows; of a stream its first `max_rows` rows."""
    return data.train.first_rows(max_rows) if isinstance(data.train, Stream) else data.train


__all__ = [
    "SOURCES",
    "BucketBatchSampler",
    "RawData",
    "as_dataset",
    "data_source",
    "read_data",
]
