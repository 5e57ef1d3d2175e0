"""Vectors of texts, from a run or a model; as files, in fewer bits.

N texts, D numbers of a vector.
"""

import logging
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from petl.adapters.export.saved_adapter import SavedAdapter, device
from petl.core.types import Settings, base_of
from petl.data.batch_sampler import chunks
from petl.data.documents import passages
from petl.data.files import located_rows
from petl.data.inputs import read_inputs
from petl.data.judgements import DOCUMENT, QUERY
from petl.data.models.loading import load_base, load_processor, new_modules
from petl.data.models.sources import read_source
from petl.data.tasks.base import Pad, pad_id
from petl.data.tasks.retrieval import Retrieval
from petl.data.tasks.retrieval.base_folder import BaseFolder
from petl.data.tasks.retrieval.reranking import Reranking
from petl.data.validation import Row, every
from petl.errors import InputError, did_you_mean, first_line, shown
from petl.generation.inference.loading import find_model
from petl.generation.prediction.columns import data_settings
from petl.generation.prediction.predictor import Predictor
from petl.generation.prediction.tables import keep_inputs, reported
from petl.ops.retrieval import pool, top_k
from petl.system.collectives import shared_out
from petl.system.files.disk import atomic_file, check_bounds
from petl.system.progress import ProgressItems
from petl.training.dataloader import longest_first, to_device
from petl.training.distributed.launch import Launch, accelerate_restored, make_accelerator
from petl.training.runs.lookup import no_embedder

logger = logging.getLogger(__name__)
ROLES = (QUERY, DOCUMENT)
LONGEST = 512  # tokens, of a model whose folder does not say; assumption
COMPARED = 8  # rows of a file of vectors; assumption
TOLERANCE = 0.02  # of a vector's length: float16 has 0.0005, bf16 about 0.005; assumption
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

    An empty text has the vector of the tokens that the tokenizer adds to each text.

    Args:
        run_or_model: folder of a run or adapter of `data.task=retrieval`, or of a model, such as a
            merged one; a `petl.Predictor` of one; or a model, whose pooling is that of its task, or
            without one the mean over the tokens.
        tokenizer: of a model.
        as_: `query` or `document`, whose prefix is put before each text.
        batch_size: texts of a batch, which has texts of similar length.

    Raises:
        InputError: there is no such run, it is of another task, an argument is wrong, or a text is
            empty and the tokenizer adds no tokens.
    """
    if as_ not in ROLES:
        raise InputError(f"as_={as_!r} is neither {QUERY!r} nor {DOCUMENT!r}")
    if isinstance(texts, str) or batch_size < 1:
        raise InputError(
            f"texts={shown(texts)} and batch_size={batch_size}: give a list of texts, and 1 or more"
        )
    texts = [*texts]
    wrong = next((each for each in texts if not isinstance(each, str)), None)
    if wrong is not None:
        raise InputError(f"texts has {shown(wrong)}, which is no text: give a list of texts")
    try:
        check_bounds(texts)
    except ValueError as error:
        raise InputError(f"texts: {error}") from error
    if isinstance(run_or_model, nn.Module):
        if tokenizer is None:
            raise InputError("tokenizer=None, but a model was given: give its tokenizer as well")
        task = getattr(base_of(run_or_model), "petl_task", None) or Retrieval(max_length=512)
        return vectors(run_or_model, task, tokenizer, texts, as_, batch_size)
    is_loaded = isinstance(run_or_model, Predictor)
    predictor = run_or_model if is_loaded else load_embedder(run_or_model)
    return vectors_of(predictor, texts, as_, batch_size)


def load_embedder(
    path: str | Path,
    *,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
) -> Predictor:
    """Load the model of a run or adapter, or of a folder as sentence-transformers writes it.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    found = find_model(path, trust_remote_code=trust_remote_code)
    if isinstance(found, SavedAdapter):
        with accelerate_restored(), torch.random.fork_rng(devices=[]):
            return Predictor.of(replace(found, other_base=other_base), batch_size)
    source, task = read_source(found), Retrieval()
    folder = BaseFolder(source)
    if folder.is_cross_encoder or (folder.scores and not folder.is_embedders):
        raise InputError(
            f"{path} is a model that scores texts ({folder.scores}): vectors need an embedder"
        )
    task.take_folder(folder)
    return plain_predictor(found, task, batch_size)


def plain_predictor(
    settings: Settings, task: Retrieval | Reranking, batch_size: int | None = None
) -> Predictor:
    """Load the model of a folder without task.json, which says the rest of its task."""
    tokenizer = load_processor(settings, task)
    task.max_length = length_of(settings, tokenizer)
    model = load_base(settings, task, processor=tokenizer)
    if new_modules(model):
        raise InputError(
            f"the model has no weights for {', '.join(new_modules(model))}, which {task.name} "
            "needs: its scores would be random"
        )
    model = model.to(device())
    accelerator = make_accelerator(Launch(), "no")
    return Predictor(model, task, tokenizer, accelerator, batch_size or 64, 1, {})


def length_of(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text at most, of a plain model: those of its folder, else `LONGEST`."""
    source = read_source(settings)
    known = BaseFolder(source).max_length
    if known is None and tokenizer.model_max_length < VERY_LARGE_INTEGER:
        known = tokenizer.model_max_length
    most = getattr(source.config().get_text_config(), "max_position_embeddings", None)
    if known is None and (most or 0) > LONGEST:
        logger.warning(
            "texts are cut to %d tokens of %d: the model's folder does not say how long they may "
            "be (model_max_length in tokenizer_config.json)",
            LONGEST,
            most,
        )
    return min(known or LONGEST, most or known or LONGEST)


def vectors_of(predictor: Predictor, texts: Sequence[str], role: str, size: int) -> np.ndarray:
    """The vectors of texts by the model of a run.

    Raises:
        InputError: the run is of another task.
    """
    task = predictor.task
    if not isinstance(task, Retrieval):
        raise no_embedder(task.name)
    with predictor.autocast():
        return vectors(predictor.model, task, predictor.processor, texts, role, size)


def divided(predictor: Predictor, texts: Sequence[str], role: str, size: int) -> np.ndarray:
    """The vectors of texts, of which each process computes a part; on every process all of them."""
    processes = predictor.accelerator.num_processes
    parts = shared_out(
        [partial(vectors_of, predictor, texts[i::processes], role, size) for i in range(processes)]
    )
    found = np.empty((len(texts), parts[0].shape[1]), np.float32)
    for i, part in enumerate(parts):
        found[i::processes] = part
    return found


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
        return np.zeros((0, task.vector_width(base_of(model).config)), np.float32)
    prefix = (task.query_prefix if role == QUERY else task.document_prefix) or ""
    ids = task.tokens(tokenizer, [prefix + text for text in texts])
    found = _pooled(model, task, Pad(pad_id(tokenizer)), ids, size)
    lost = np.flatnonzero(~np.isfinite(found).all(1))
    if len(lost):
        raise InputError(
            f"the model gives {len(lost)} of {len(texts)} texts a vector that is not finite, the "
            f"first of them text {lost[0] + 1}, {shown(texts[lost[0]])}: its weights are damaged"
        )
    return found


def vectors_of_tokens(predictor: Predictor, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """The vectors of texts that are tokens already, in one batch."""
    task = predictor.task
    assert isinstance(task, Retrieval), "the caller looks"
    with predictor.autocast():
        return _pooled(predictor.model, task, Pad(pad_id(predictor.processor)), ids, len(ids))


@torch.no_grad()
def _pooled(
    model: nn.Module, task: Retrieval, pad: Pad, ids: Sequence[Sequence[int]], size: int
) -> np.ndarray:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = np.zeros((0, 0), np.float32)
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
        if not len(found):  # the width is that of the first batch
            found = np.zeros((len(ids), vector.shape[1]), np.float32)
        found[part] = vector.float().cpu().numpy()
    model.train(was_training)
    return found


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


# Files


class VectorFile(NamedTuple):
    """Where vectors go, and which.

    Attributes:
        role: `query` or `document`.
        dtype: in `DTYPES`.
        calibrate: file of texts that give the ranges of int8; None: those of the vectors.
    """

    file: Path
    role: str = DOCUMENT
    dtype: str = "float32"
    calibrate: str | None = None


def write_vectors(
    saved: SavedAdapter,
    names: Sequence[str],
    out: VectorFile,
    settings: Sequence[str] = (),
    batch_size: int | None = None,
) -> None:
    """Write the vectors of the texts of files and folders, one row a text.

    As NumPy's .npy; or .parquet, with the columns of the rows before `vector`.

    Args:
        settings: of columns, such as "data.text=review", in place of those of the run.

    Raises:
        InputError: a file or row is wrong, the run is of another task, `calibrate` is given
            without int8, or a file to read would be replaced.
        RunStopped: the file cannot be written.
    """
    keep_inputs(out.file, filter(None, [*names, out.calibrate]))
    if out.calibrate is not None and out.dtype != "int8":
        raise InputError(f"--calibrate={out.calibrate} is for --dtype=int8, not {out.dtype}")
    rows = [*rows_of(saved, names, settings)]
    texts = [row["text"] for _, row in rows]
    ranges = [] if out.calibrate is None else texts_of(saved, [out.calibrate], settings)
    predictor = Predictor.of(saved, batch_size)
    size = predictor.batch_size
    found = divided(predictor, texts, out.role, size)
    calibration = divided(predictor, ranges, out.role, size) if ranges else None
    if not predictor.accelerator.is_main_process:
        return
    values = quantized(found, out.dtype, calibration)
    with reported(out.file), atomic_file(out.file) as opened:
        if out.file.suffix == ".npy":
            np.save(opened, values)
        else:
            pq.write_table(with_vectors([own for own, _ in rows], values), opened)


def gives_vectors(saved: SavedAdapter) -> bool:
    """True if the task of a saved adapter is retrieval."""
    return isinstance(saved.saved_task, Retrieval)


def with_vectors(rows: list[Row], values: np.ndarray) -> pa.Table:
    """A table of rows with `vector`, a list of as many numbers each.

    Raises:
        InputError: rows have a column `vector`, or one of several types.
    """
    if any("vector" in row for row in rows):
        raise InputError(
            f"the {len(rows)} rows have a column vector, as that of their vectors: rename it"
        )
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    try:
        return pa.Table.from_pylist(rows).append_column("vector", lists)
    except pa.ArrowException as error:
        raise InputError(
            f"{first_line(error)}: columns of parquet have one type; write vectors to .npy"
        ) from error


def texts_of(saved: SavedAdapter, names: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The texts of files; errors as of `rows_of`."""
    return [row["text"] for _, row in rows_of(saved, names, settings)]


def rows_of(
    saved: SavedAdapter, names: Sequence[str], settings: Sequence[str]
) -> Iterator[tuple[Row, Row]]:
    """The rows of files, and with their text, as the task of a saved adapter reads it.

    Raises:
        InputError: a file or row is wrong, or the run is of another task.
    """
    task = saved.saved_task
    if not isinstance(task, Retrieval):
        raise no_embedder(task.name)
    columns = data_settings(saved.columns, task, settings, labels=False)
    for name in names:
        if Path(name).expanduser().is_dir():
            for passage in passages("FILE", name):
                yield {"text": passage.searched}, {"text": passage.searched}
        else:
            yield from read_inputs([name], task, columns)


# Search


class Hit(NamedTuple):
    """A text that was found."""

    similarity: float
    id: str
    text: str


def read_corpus(name: str, column: str | None = None) -> list[tuple[str, str]]:
    """Ids and texts of a file, or places and passages of a folder of texts.

    Without ids, they are the numbers of the rows, from 0.

    Args:
        column: of the texts of a file; None: text.

    Raises:
        InputError: the file cannot be read, or a row has no text.
    """
    if Path(name).expanduser().is_dir():
        if column is not None:
            raise InputError(f"--column={column} is for a file, and {name} is a folder of texts")
        return [(passage.place, passage.searched) for passage in passages("FILE", name)]
    found = []
    for number, (place, row) in enumerate(located_rows("FILE", [name], every)):
        value = row.get(column or "text")
        if not isinstance(value, str) or not value.strip():
            hint = did_you_mean(column or "text", row)
            raise InputError(
                f"{place} has no text in its column {column or 'text'}{hint}: {shown(row)}; "
                "--column=NAME names another one"
            )
        found.append((str(row.get("id", row.get("_id", number))), value))
    return found


def nearest(
    predictor: Predictor,
    corpus: Sequence[tuple[str, str]],
    queries: Sequence[str],
    k: int,
    file: Path | None = None,
) -> list[list[Hit]]:
    """The `k` nearest texts of each query, the nearest first.

    Args:
        corpus: ids and texts.
        file: their vectors, float32 or float16; None: they are computed.

    Raises:
        InputError: the run is of another task, a query cannot be encoded, or the vectors are not
            those of the corpus.
    """
    asked = vectors_of(predictor, queries, QUERY, predictor.batch_size)
    if file is None:
        texts = [text for _, text in corpus]
        documents = vectors_of(predictor, texts, DOCUMENT, predictor.batch_size)
    else:
        documents = read_vectors(file, predictor, [text for _, text in corpus])
    both = [torch.from_numpy(np.asarray(each, np.float32)) for each in (asked, documents)]
    task = predictor.task
    assert isinstance(task, Retrieval), "vectors_of refuses others"
    if task.similarity == "cosine":
        both = [F.normalize(each, dim=-1) for each in both]
    scores, rows = top_k(*both, min(k, len(corpus)))
    return [
        [Hit(score, *corpus[row]) for score, row in zip(*each, strict=True)]
        for each in zip(scores.tolist(), rows.tolist(), strict=True)
    ]


def read_vectors(file: Path, predictor: Predictor, texts: Sequence[str]) -> np.ndarray:
    """The vectors of texts in a file of NumPy; some of them are computed again and compared.

    Raises:
        InputError: it is none, has another shape or type than floats, or vectors of other texts or
            of another model.
    """
    try:
        found = np.lib.format.open_memmap(file, mode="c")
    # what numpy's reading of a header raises
    except (OSError, ValueError, SyntaxError, OverflowError, tokenize.TokenError) as error:
        raise InputError(f"{file} cannot be read as vectors: {first_line(error)}") from error
    rows = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), COMPARED)).astype(int))
    own = vectors_of(predictor, [texts[row] for row in rows], DOCUMENT, predictor.batch_size)
    again = f"write them with petl predict --out={file}"
    if found.shape != (len(texts), own.shape[1]) or found.dtype.kind != "f":
        raise InputError(
            f"{file} has {found.dtype} {list(found.shape)}, and the texts have float vectors "
            f"{[len(texts), own.shape[1]]}: {again}"
        )
    length = np.linalg.norm(own, axis=1)
    other = ~(np.linalg.norm(found[rows] - own, axis=1) <= TOLERANCE * length)
    if other.any():
        text = shown(texts[rows[other][0]])
        raise InputError(
            f"row {rows[other][0]} of {file} is not the vector of its text {text}: another model "
            f"or other texts were used; {again}"
        )
    return found
