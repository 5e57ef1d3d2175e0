"""Encoding once: encoded rows are kept on disk under the hash of all that made them."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
import tokenizers
import transformers
from datasets import Dataset, Features
from datasets.utils.tqdm import are_progress_bars_disabled
from transformers import PreTrainedTokenizerBase

from petl.files.cache import cache_folder
from petl.tasks.rows import Columns

FORMAT = 2  # raise when encoded rows change their meaning
logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """What `encode_once` needs of a task, see `petl.tasks.base.Task`."""

    encoded_at_once: ClassVar[int]

    def encode_rows(self, processor: Any, rows: Any, /) -> Columns: ...

    def features(self, processor: Any) -> Features | None: ...

    def settings(self) -> dict[str, Any]: ...


def encode_once(task: Encoder, processor: Any, split: Dataset) -> Dataset:
    """`task.encode_rows` over all of `split`, read back when the same was encoded before."""
    key = fingerprint(task, processor, split)
    folder = writable(cache_folder() / "encoded")
    with without_bars():
        return split.map(
            lambda rows: task.encode_rows(processor, rows),
            batched=True,
            batch_size=task.encoded_at_once,
            writer_batch_size=task.encoded_at_once,
            features=task.features(processor),
            remove_columns=split.column_names,
            new_fingerprint=key,
            cache_file_name=str(folder / f"{key}.arrow") if folder else None,
            keep_in_memory=folder is None,
        )


def fingerprint(task: Encoder, processor: Any, split: Dataset) -> str:
    """The hash of all that encoded rows depend on, hexadecimal."""
    made_of = {
        "format": FORMAT,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "rows": content_hash(split),
        "task": task.settings(),
        "processor": processor_state(processor),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(split: Dataset) -> str:
    """The hash of a split's rows and column types, hexadecimal, however the rows came to be."""
    hasher = hashlib.sha256(str(split.features).encode())
    for table in split.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            hasher.update(batch.serialize())
    return hasher.hexdigest()


def processor_state(processor: Any) -> dict[str, object]:
    """What decides a processor's output."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return tokenizer_state(processor)
    return {"class": type(processor).__qualname__, **processor.to_dict()}


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What decides a tokenizer's output."""
    state: dict[str, object] = {
        "class": type(tokenizer).__qualname__,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {**state, "init": tokenizer.init_kwargs, "vocabulary": tokenizer.get_vocab()}
    # what its last call asked for; the next call asks anew
    backend.no_padding()
    backend.no_truncation()
    return {**state, "backend": backend.to_str()}


def writable(folder: Path) -> Path | None:
    """The folder, made if it is lacking; None when this user cannot write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.info("encoded rows stay in memory: %s is not writable (%s)", folder, error)
        return None


@contextmanager
def without_bars() -> Generator[None]:
    """Silences the progress bars of `datasets` inside the block."""
    were_off = are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
