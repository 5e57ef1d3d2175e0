"""Hard negatives: texts that are near to a query and do not answer it.

Q queries, N texts, D numbers of a vector.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from petl.data.files import located_rows
from petl.data.judgements import DOCUMENT, QUERY
from petl.data.tasks.retrieval import Retrieval
from petl.data.validation import Row, read, require, text
from petl.errors import InputError
from petl.generation.prediction.predictor import Predictor
from petl.generation.prediction.tables import new_table, reported
from petl.generation.prediction.vectors import read_vectors, vectors_of
from petl.ops.retrieval.ranking import LeftOut, hardest
from petl.system.progress import ProgressItems

logger = logging.getLogger(__name__)
QUERIES = 2048  # that are searched at a time; assumption: with a chunk of documents, 100 MB


class NegativeChoice(NamedTuple):
    """Which texts are negatives.

    Attributes:
        k: of a row at most.
        margin: their similarity is at most that of the positive, less this; None: any.
        skip: so many of the nearest are left out, which may well be answers.
    """

    k: int
    margin: float | None = None
    skip: int = 0


class QueryPositives(NamedTuple):
    """Queries with their positives, and the vectors of both.

    Attributes:
        rows: `query` and `positive`.
        numbers: of the query of each row in `vectors`.
        vectors: of the different queries, [Q, D].
        limits: similarities of negatives at most, by row; None: any.
    """

    rows: list[Row]
    numbers: Tensor
    vectors: Tensor
    limits: Tensor | None


def mine(
    predictor: Predictor,
    texts: Sequence[str],
    rows: list[Row],
    out: Path,
    choice: NegativeChoice,
    vectors: Path | None = None,
) -> tuple[int, int]:
    """Write rows with negatives; return how many, and the number of negatives in all.

    Texts that equal the query, or one of its positives in any row, are none; equal ones are one.
    Rows without a negative are left out.

    Args:
        texts: of the corpus.
        rows: with `query` and `positive`, as of `read_pairs`.
        out: csv, tsv, jsonl or parquet; its rows have `query`, `positive` and `negatives`.
        vectors: of the corpus, float32 or float16, in a file of NumPy that is read in chunks; None:
            they are computed.

    Raises:
        InputError: the model is no embedder, a file cannot be used, or no row has a negative.
        RunStopped: `out` cannot be written.
    """
    pairs = _pairs_of(predictor, rows, choice.margin)
    if vectors is None:
        found = vectors_of(predictor, texts, DOCUMENT, predictor.batch_size)
    else:
        found = read_vectors(vectors, predictor, texts)
    written = negatives = 0
    with new_table(out) as table:
        for part in _with_negatives(predictor, pairs, texts, torch.from_numpy(found), choice):
            with reported(out):
                table.write(part)
            written += len(part)
            negatives += sum(len(row["negatives"]) for row in part)
        if not written:
            raise InputError(
                f"none of {len(texts)} texts is a negative of {len(rows)} rows with --k={choice.k} "
                f"--margin={choice.margin} --skip={choice.skip}: lower margin or skip"
            )
    return written, negatives


def read_pairs(name: str, query: str = "query", positive: str = "positive") -> list[Row]:
    """The rows of a file as `query` and `positive`.

    Args:
        query, positive: what the columns are called.

    Raises:
        InputError: a column is missing, or a text is empty.
    """

    def choose(present: Iterable[str], origin: str) -> list[str]:
        return require([query, positive], present, origin)

    rows = []
    for place, row in located_rows("QUERIES", [name], choose):
        try:
            both = (("query", query), ("positive", positive))
            rows.append({name: read(row, column, text) for name, column in both})
        except ValueError as error:
            raise InputError(f"{place}: {error}") from error
    if not rows:
        raise InputError(f"{name} has no rows")
    return rows


def _pairs_of(predictor: Predictor, rows: list[Row], margin: float | None) -> QueryPositives:
    """The vectors of queries; with a margin, those of positives give the limits."""
    size = predictor.batch_size
    # a query may have several rows, and one vector
    different = list(dict.fromkeys(row["query"] for row in rows))
    numbers = {query: i for i, query in enumerate(different)}
    places = torch.tensor([numbers[row["query"]] for row in rows])
    queries = _normal(predictor, vectors_of(predictor, different, QUERY, size))
    if margin is None:
        return QueryPositives(rows, places, queries, None)
    answers = list(dict.fromkeys(row["positive"] for row in rows))
    known = {answer: i for i, answer in enumerate(answers)}
    own = torch.tensor([known[row["positive"]] for row in rows])
    positives = _normal(predictor, vectors_of(predictor, answers, DOCUMENT, size))
    return QueryPositives(rows, places, queries, (queries[places] * positives[own]).sum(1) - margin)


def _normal(predictor: Predictor, found: np.ndarray) -> Tensor:
    """Vectors whose products with normal ones are similarities of the run."""
    vectors = torch.from_numpy(found)
    return F.normalize(vectors, dim=-1) if _is_cosine(predictor) else vectors


def _is_cosine(predictor: Predictor) -> bool:
    assert isinstance(predictor.task, Retrieval), "vectors_of refuses others"
    return predictor.task.similarity == "cosine"


def _with_negatives(
    predictor: Predictor,
    pairs: QueryPositives,
    texts: Sequence[str],
    documents: Tensor,
    choice: NegativeChoice,
) -> Iterator[list[Row]]:
    """Yield the rows that have negatives, in parts."""
    known: dict[str, set[str]] = defaultdict(set)
    for row in pairs.rows:
        known[row["query"]] |= {row["query"], row["positive"]}
    # the first of equal texts stands for all
    places: dict[str, int] = {}
    copies = [i for i, one in enumerate(texts) if places.setdefault(one, i) != i]
    starts = range(0, len(pairs.rows), QUERIES)
    for start in ProgressItems(starts, f"searching {len(texts):,} texts", quiet=True):
        rows, part = pairs.rows[start : start + QUERIES], slice(start, start + QUERIES)
        # in the order of documents, as chunks of them are searched
        left_out = sorted(
            (places[one], i)
            for i, row in enumerate(rows)
            for one in known[row["query"]]
            if one in places
        )
        scores, found = hardest(
            pairs.vectors[pairs.numbers[part]],
            documents,
            choice.k,
            LeftOut(
                torch.tensor([(i, place) for place, i in left_out], dtype=torch.long).view(-1, 2),
                None if pairs.limits is None else pairs.limits[part],
                choice.skip,
                torch.tensor(copies, dtype=torch.long),
            ),
            cosine=_is_cosine(predictor),
        )
        yield [
            {
                **row,
                "negatives": [texts[j] for j, s in zip(own, near, strict=True) if s > -torch.inf],
            }
            for row, own, near in zip(rows, found.tolist(), scores.tolist(), strict=True)
            if near[0] > -torch.inf
        ]
