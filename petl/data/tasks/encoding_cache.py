"""A cache of encoded rows on disk, by the hash of everything that they depend on; their columns."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import datasets
import tokenizers
import transformers
from datasets import Dataset, Features
from datasets.utils.tqdm import are_progress_bars_disabled
from transformers import (
    BaseImageProcessor,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from petl.system.files.disk import is_as_noted, note_digest, remove
from petl.system.files.paths import cache_folder
from petl.system.progress import Pass

# attributes that the backend does not have, or that it gets with each call; the last of translation
OUTSIDE_BACKEND = (
    "truncation_side",
    "model_input_names",
    "split_special_tokens",
    "src_lang",
    "tgt_lang",
)
Columns = dict[str, list[Any]]
AT_ONCE = 1000  # rows that are read together: alone each takes 40 microseconds
FORMAT = 6  # increment when the meaning of encoded rows changes
logger = logging.getLogger(__name__)


P = TypeVar("P", contravariant=True)


class Encoder(Protocol[P]):
    """The part of `petl.data.tasks.base.Task` that `encode_once` uses."""

    encoded_at_once: ClassVar[int]

    def encode_rows(self, processor: P, rows: Columns, /) -> Columns:
        """See `Task.encode_rows`."""

    def features(self, processor: P, /) -> Features | None:
        """See `Task.features`."""

    def settings(self) -> Mapping[str, object]:
        """See `Task.settings`."""


def encode_once(task: Encoder[P], processor: P, split: Dataset) -> Dataset:
    """Apply `task.encode_rows` to all of `split`, or read the result from the cache."""
    # the hash names the file: a changed dependency is another file, and none becomes stale
    key = fingerprint(task, processor, split)
    folder = writable(cache_folder() / "encoded")
    if folder is not None:
        file = folder / f"{key}.arrow"
        try:
            return _through(file, task, processor, split, key)
        except OSError as error:  # a full disk, or another user's file
            logger.warning("encoded rows are not cached on disk: %s (%s)", file, error)
    return _encoded(task, processor, split, key)


def _through(file: Path, task: Encoder[P], processor: P, split: Dataset, key: str) -> Dataset:
    """Return the rows in a file of the cache, which is written if it is absent or damaged.

    Raises:
        OSError: it can be neither read nor written.
    """
    # `datasets` would read whatever bytes a disk gives it
    is_cached = is_as_noted(file)
    if file.exists() and not is_cached:
        logger.warning("%s is damaged or incomplete: encoding again", file)
        remove(file)
    encoded = _encoded(task, processor, split, key, file)
    if file.exists() and not is_cached:  # a split without rows has none
        note_digest(file)
    return encoded


def _encoded(
    task: Encoder[P], processor: P, split: Dataset, key: str, file: Path | None = None
) -> Dataset:
    """Return the encoded rows, by way of a file if there is one; they are read if it has them."""
    what = f"encoding {len(split):,} examples"
    shown = Pass(what, len(split), unit="examples", quiet=True)  # the cache may have them

    def encode(rows: Columns, numbers: list[int]) -> Columns:
        encoded = task.encode_rows(processor, rows)
        shown.advance(len(numbers))
        return encoded

    with without_progress_bars(), shown:
        return split.map(
            encode,
            batched=True,
            with_indices=True,
            batch_size=task.encoded_at_once,
            writer_batch_size=task.encoded_at_once,
            features=task.features(processor),
            remove_columns=split.column_names,
            # without it `datasets` hashes the function, which holds the tokenizer with its state
            new_fingerprint=key,
            cache_file_name=str(file) if file else None,
            keep_in_memory=file is None,
        )


def fingerprint(task: Encoder[P], processor: P, split: Dataset) -> str:
    """A hexadecimal hash of everything that encoded rows depend on."""
    ingredients = {
        "format": FORMAT,
        # tokenizers may change between versions
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "rows": content_hash(split),
        "task": task.settings(),
        "processor": processor_state(processor),
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(split: Dataset) -> str:
    """A hexadecimal hash of a split's rows and column types, whatever their origin."""
    # `datasets` has a fingerprint too, but it hashes the operations that made the rows
    hasher = hashlib.sha256(str(split.features).encode())
    for table in split.with_format("arrow").iter(batch_size=1000):
        # chunks depend on how the rows were written, not on their content
        for batch in table.combine_chunks().to_batches():
            hasher.update(batch.serialize())
    return hasher.hexdigest()


def processor_state(processor: object) -> dict[str, object]:
    """All attributes that determine the output of a processor, JSON-serializable."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return tokenizer_state(processor)
    if isinstance(processor, ProcessorMixin):
        parts = [getattr(processor, name) for name in processor.get_attributes()]
        return {**processor.to_dict(), "parts": [processor_state(part) for part in parts]}
    assert isinstance(processor, BaseImageProcessor | FeatureExtractionMixin)
    return {"class": type(processor).__qualname__, **processor.to_dict()}


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """All attributes that determine the output of a tokenizer, JSON-serializable."""
    # not the name or path: the same tokenizer may be in several places
    state: dict[str, object] = {
        "class": type(tokenizer).__qualname__,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        **{name: getattr(tokenizer, name, None) for name in OUTSIDE_BACKEND},
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # a slow tokenizer has no serialized backend
    if backend is None:
        return {**state, "init": tokenizer.init_kwargs, "vocabulary": tokenizer.get_vocab()}
    # the backend keeps the options of its last call, which each call sets again
    backend.no_padding()
    backend.no_truncation()
    return {**state, "backend": backend.to_str()}


def writable(folder: Path) -> Path | None:
    """Create the folder if it is missing; None if this user cannot write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # an attempt to write is more reliable than reading permissions
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.info("encoded rows are not cached on disk: %s is not writable (%s)", folder, error)
        return None


@contextmanager
def without_progress_bars() -> Generator[None]:
    """Disable the progress bars of `datasets` inside the block."""
    were_off = are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


# Columns


def values_of(rows: Dataset, name: str) -> Iterator[Any]:
    """Yield the values of a column."""
    for part in rows.select_columns(name).iter(AT_ONCE):
        yield from part[name]


def sizes_of(rows: Dataset, name: str) -> list[int]:
    """Return the lengths of the lists in a column."""
    parts = rows.select_columns(name).with_format("arrow").iter(AT_ONCE)
    sizes = (part[name].combine_chunks().value_lengths().to_pylist() for part in parts)
    return [size for part in sizes for size in part]
