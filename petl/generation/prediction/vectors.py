"""Vectors of texts, from a run or a model; as files, in fewer bits.

N texts, D numbers of a vector.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from petl.core.types import base_of
from petl.data.batch_sampler import chunks
from petl.data.judgements import DOCUMENT, QUERY
from petl.data.tasks.base import Pad, pad_id
from petl.data.tasks.retrieval import Retrieval
from petl.errors import InputError, shown
from petl.generation.prediction.predictor import Predictor
from petl.ops.retrieval import pool
from petl.system.progress import ProgressItems
from petl.training.dataloader import longest_first, to_device

ROLES = (QUERY, DOCUMENT)
DTYPES = ("float32", "float16", "int8", "binary")  # of written vectors


def embed(
    run_or_model: str | Path | Predictor | nn.Module,
    texts: Iterable[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    as_: str = DOCUMENT,
    batch_size: int = 64,
) -> np.ndarray:
    """Return the vectors of texts, float32 [N, D].

        petl.embed("runs/mine", ["what is a verb"], as_="query")

    Args:
        run_or_model: folder of a run or adapter of `data.task=retrieval`; a `petl.Predictor` of
            one; or a model, whose pooling is that of its task, or without one the mean over the
            tokens.
        tokenizer: of a model.
        as_: `query` or `document`, whose prefix is put before each text.
        batch_size: texts of a batch, which has texts of similar length.

    Raises:
        InputError: there is no such run, it is of another task, or an argument is wrong.
    """
    if as_ not in ROLES:
        raise InputError(f"as_={as_!r} is neither {QUERY!r} nor {DOCUMENT!r}")
    if isinstance(texts, str) or batch_size < 1:
        raise InputError(
            f"texts={shown(texts)} and batch_size={batch_size}: give a list of texts, and 1 or more"
        )
    if isinstance(run_or_model, nn.Module):
        if tokenizer is None:
            raise InputError("tokenizer=None, but a model was given: give its tokenizer as well")
        task = getattr(base_of(run_or_model), "petl_task", None) or Retrieval(max_length=512)
        return vectors(run_or_model, task, tokenizer, [*texts], as_, batch_size)
    is_loaded = isinstance(run_or_model, Predictor)
    predictor = run_or_model if is_loaded else Predictor.load(run_or_model)
    return vectors_of(predictor, [*texts], as_, batch_size)


def vectors_of(predictor: Predictor, texts: Sequence[str], role: str, size: int) -> np.ndarray:
    """The vectors of texts by the model of a run.

    Raises:
        InputError: the run is of another task.
    """
    task = predictor.task
    if not isinstance(task, Retrieval):
        raise InputError(f"the run is of data.task={task.name}: vectors need data.task=retrieval")
    with predictor.autocast():
        return vectors(predictor.model, task, predictor.processor, texts, role, size)


@torch.no_grad()
def vectors(
    model: nn.Module,
    task: Retrieval,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    role: str,
    size: int,
) -> np.ndarray:
    """The vectors of texts, in batches of `size` of similar length."""
    if not texts:
        return np.zeros((0, base_of(model).config.get_text_config().hidden_size), np.float32)
    prefix = (task.query_prefix if role == QUERY else task.document_prefix) or ""
    ids = task.tokens(tokenizer, [prefix + text for text in texts])
    pad, device = Pad(pad_id(tokenizer)), next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: list[np.ndarray | None] = [None] * len(ids)
    batches = chunks(longest_first([len(own) for own in ids]), size)
    for part in ProgressItems(batches, f"vectors of {len(ids):,} texts", quiet=True):
        rows = [{"input_ids": ids[i], "attention_mask": [1] * len(ids[i])} for i in part]
        inputs = to_device(pad.inputs(rows), device)
        outputs = model(**inputs)
        vector = outputs.get("sentence_embedding")
        if vector is None:  # a model that no run has loaded
            vector = pool(
                outputs.last_hidden_state, inputs["attention_mask"], task.pooling or "mean"
            )
        for i, own in zip(part, vector.float().cpu().numpy(), strict=True):
            found[i] = own
    model.train(was_training)
    return np.stack([each for each in found if each is not None])


def quantized(values: np.ndarray, dtype: str, calibration: np.ndarray | None = None) -> np.ndarray:
    """Vectors in another type.

    `int8` has 255 steps from the smallest to the largest value of each column, as the
    `quantize_embeddings` of sentence-transformers; `binary` the signs as bits, eight in a byte, the
    most significant first: uint8 [N, D / 8], rounded up.

    Args:
        calibration: vectors that give the ranges of int8, [M, D]; None: the values themselves.
    """
    if dtype == "binary":
        return np.packbits(values > 0, axis=1)
    if dtype != "int8":
        return values.astype(dtype)
    ranges = values if calibration is None else calibration
    low, high = ranges.min(0), ranges.max(0)
    steps = np.where(high > low, (high - low) / 255, 1)
    # values outside of the ranges would wrap around
    return (np.clip(np.floor((values - low) / steps), 0, 255) - 128).astype(np.int8)
