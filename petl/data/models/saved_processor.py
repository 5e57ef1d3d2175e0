"""The tokenizer or other processor that an adapter was trained with, which its folder has."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from petl.core.adapter_folder import Folder
from petl.core.spec.facts import facts_of
from petl.data.models.image_processor import load_image_text_processor
from petl.data.models.loading import (
    load_processor,
    loading,
    with_padding_token,
)
from petl.data.models.new_tokens import PLAIN, numbers_of, plain_of
from petl.data.models.sources import FILES, Settings, has_tokenizer, read_source
from petl.data.tasks.base import P, Task, tokenizer_in
from petl.errors import InputError

logger = logging.getLogger(__name__)
HERE = {"revision": "main", "local_files_only": True}  # the adapter's folder is a local one


def load_saved_processor(cfg: Settings, task: Task[P], adapter: Path, base: P | None = None) -> P:
    """Load the processor in an adapter's folder; without one, that of the base model.

    If the base model's is another one now, one line says what differs; else that one is returned.

    Args:
        base: the processor of the base model, if it is loaded already.

    Raises:
        InputError: it cannot be read; or there is none, nor one of the base model; or its new
            tokens have other numbers than the rows of the adapter.
    """
    processor = _saved_or_base(cfg, task, adapter, base)
    trained = facts_of(Folder(adapter).config).trained_tokens
    for token in task.new_tokens or ():
        (number,) = numbers_of(tokenizer_in(processor), [token])
        if number not in trained:
            raise InputError(
                f"{adapter} has no row for its new token {token!r}, which is number {number} of "
                "this tokenizer: use the tokenizer that was saved with the adapter"
            )
    return processor


def _saved_or_base(cfg: Settings, task: Task[P], adapter: Path, base: P | None) -> P:
    kind = task.processor_class
    files = any((adapter / name).is_file() for name in FILES)
    has_own = has_tokenizer(adapter) if kind is AutoTokenizer else files
    if not has_own:
        return load_processor(cfg, task) if base is None else base
    source = read_source(cfg)
    options: dict[str, Any] = {**source.options(), **HERE}
    try:
        with loading(source):
            own: Any = (
                load_image_text_processor(adapter, source.config(), options)
                if kind is AutoProcessor
                else kind.from_pretrained(adapter, **options)
            )
            if task.reads_text:
                with_padding_token(tokenizer_in(own), str(adapter))
    except (InputError, KeyError) as error:
        raise InputError(f"{adapter} has a tokenizer or processor, but {error}") from error
    try:
        base = load_processor(cfg, task) if base is None else base
    except InputError:  # nothing to compare with, and nothing that is needed
        return own
    differing = differences(own, base)
    if not differing:
        return base
    if task.new_tokens:
        # what the base reads, where it is compared with
        setattr(tokenizer_in(own), PLAIN, plain_of(tokenizer_in(base)))
    logger.warning(
        "%s of the base model %s differs now from that in %s, with which the adapter was "
        "trained and which is used",
        " and ".join(differing),
        source.name,
        adapter,
    )
    return own


def differences(own: Any, base: Any) -> list[str]:
    """Name what differs between two tokenizers, or two processors."""
    if not hasattr(own, "get_vocab"):
        one, other = own.to_dict(), base.to_dict()
        keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        pair = tokenizer_in(own), tokenizer_in(base)
        return [*keys, *(differences(*pair) if pair[0] is not own else ())]
    parts = {
        "chat template": lambda tokenizer: tokenizer.chat_template,
        "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
        "special tokens": lambda tokenizer: tokenizer.special_tokens_map,
        "division into tokens": lambda tokenizer: tokenizer(PROBE)["input_ids"],
    }
    return [name for name, part in parts.items() if part(own) != part(base)]


PROBE = "A text,\n with 12.5 Numbers, Ünïcode and  spaces"
