"""Rankings of documents by their vectors, their scores, and the rows that are ranked.

Q queries, N documents, D numbers of a vector.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, stdev

import numpy as np
import torch.nn.functional as F
from datasets import Dataset
from scipy import stats
from torch import Tensor

from petl.data.judgements import (
    DOCUMENT,
    LABELLED,
    QUERY,
    Grades,
    alike,
    are_grades,
    grades_of,
    is_ranked,
    judged,
)
from petl.data.tasks.base import Columns, Prediction, rounded
from petl.data.tasks.scores import INTERVAL
from petl.errors import InputError
from petl.ops.retrieval import top_k
from petl.ops.retrieval.ranking import CUTS, query_metrics

Tokens = tuple[int, ...]  # of a text
NDCG_INTERVAL = f"ndcg_at_10{INTERVAL}"


@dataclass(frozen=True)
class Ranked:
    """A query with the documents that are nearest to it.

    Attributes:
        row: of the query.
        documents: ids, the nearest first.
        similarities: of these.
        relevant: the grades of relevant documents, by id.
        nearest_relevant: the similarity of the nearest of these.
        scores: see `query_metrics`.
    """

    row: int
    documents: list[str]
    similarities: list[float]
    relevant: Mapping[str, float]
    nearest_relevant: float
    scores: dict[str, float]

    @property
    def nearest_other(self) -> float | None:
        """The similarity of the nearest document that is not relevant; None: none is near."""
        near = zip(self.documents, self.similarities, strict=True)
        return next((value for name, value in near if name not in self.relevant), None)

    @property
    def rank(self) -> int | None:
        """The rank of the first relevant document, from 1; None: it is not among the nearest."""
        found = (rank for rank, name in enumerate(self.documents, 1) if name in self.relevant)
        return next(found, None)

    @property
    def has_tie(self) -> bool:
        """True if a score depends on the order of two documents that are equally near."""
        near = self.similarities
        return any(cut < len(near) and near[cut - 1] == near[cut] for cut in CUTS)

    def described(self, text: Callable[[str], str]) -> Prediction:
        """The entry of a file of predictions; `text` gives the text of a document."""
        best = max(self.relevant, key=lambda name: self.relevant[name])
        return {
            "label": text(best),
            "prediction": text(self.documents[0]),
            "rank": self.rank,
            "similarity": rounded(self.similarities[0]),
            "nearest_relevant": rounded(self.nearest_relevant),
            "nearest_other": None if self.nearest_other is None else rounded(self.nearest_other),
            "ndcg_at_10": rounded(self.scores["ndcg_at_10"]),
        }


@dataclass(frozen=True)
class Rankings:
    """The rankings of all queries that have a relevant document; `left_out` counts the others."""

    queries: list[Ranked]
    left_out: int

    @classmethod
    def of(cls, values: Tensor, rows: Dataset | Columns, similarity: str) -> "Rankings":
        """Rank the documents for each query.

        Args:
            values: the vector of each row, [Q + N, D].
            rows: with the columns `_role`, `_id`, `_relevant`.
            similarity: `cosine` or `dot`.

        Raises:
            InputError: there are no documents, or no query has a relevant one.
        """
        roles, ids = list(rows["_role"]), list(rows["_id"])
        # of equally near documents the smaller id comes first, as text
        documents = sorted(
            (i for i, role in enumerate(roles) if role == DOCUMENT), key=ids.__getitem__
        )
        grades = {
            i: {
                name: grade for name, grade in json.loads(rows["_relevant"][i]).items() if grade > 0
            }
            for i, role in enumerate(roles)
            if role == QUERY
        }
        queries = [i for i, own in grades.items() if own]
        if not documents or not queries:
            raise InputError(
                f"of {len(grades)} queries {len(queries)} have a relevant document, among "
                f"{len(documents)}: nothing can be scored"
            )
        vectors = values if similarity == "dot" else F.normalize(values, dim=-1)
        count = min(max(CUTS) + 1, len(documents))  # one more, which shows a tie at the last cut
        near, places = top_k(vectors[queries], vectors[documents], count)
        names = [ids[i] for i in documents]
        row_of = dict(zip(names, documents, strict=True))
        found = []
        for query, own, row in zip(queries, near.tolist(), places.tolist(), strict=True):
            ranked = [names[place] for place in row]
            scores = query_metrics(ranked, grades[query])
            # which may be farther away than all that are ranked
            relevant = vectors[[row_of[name] for name in grades[query]]] @ vectors[query]
            nearest = relevant.max().item()
            found.append(Ranked(query, ranked, own, grades[query], nearest, scores))
        return cls(found, len(grades) - len(queries))

    @classmethod
    def of_candidates(cls, values: Sequence[float], rows: Dataset | Columns) -> "Rankings":
        """Rank the documents of each query by their scores; equal ones by their ids, as text.

        Args:
            values: the score of each row.
            rows: with the columns `_query_id`, `_id` and `_grade`.

        Raises:
            InputError: no query has a document that is relevant and one that is not, or a score is
                no number.
        """
        if not np.isfinite(values).all():
            raise InputError("the score of a pair is not finite: nothing can be ranked")
        by_query: dict[str, list[tuple[float, str, float, int]]] = {}
        columns = (rows[name] for name in ("_query_id", "_id", "_grade"))
        for row, (value, query, name, grade) in enumerate(zip(values, *columns, strict=True)):
            # negated: the largest come first
            by_query.setdefault(query, []).append((-value, name, grade, row))
        found = []
        for own in by_query.values():
            negated, names, grades, places = zip(*sorted(own), strict=True)
            if is_ranked(grades):
                near = [-value for value in negated]
                by_name = dict(zip(names, grades, strict=True))
                relevant = {name: grade for name, grade in by_name.items() if grade > 0}
                scores = query_metrics(names, by_name)
                both = zip(names, near, strict=True)
                nearest = max(value for name, value in both if name in relevant)
                found.append(Ranked(min(places), [*names], near, relevant, nearest, scores))
        if not found:
            raise InputError(
                f"none of {len(by_query)} queries has a document that is relevant and one that is "
                "not: nothing can be scored"
            )
        return cls(found, len(by_query) - len(found))

    def scores(self) -> dict[str, float]:
        """The mean of each score over queries, half of nDCG's 95 % interval, and counts."""
        all_scores = [query.scores for query in self.queries]
        means = {name: fmean(each[name] for each in all_scores) for name in all_scores[0]}
        values = [each["ndcg_at_10"] for each in all_scores]
        return {
            **means,
            NDCG_INTERVAL: half_interval(values),
            "queries": float(len(values)),
            "queries_left_out": float(self.left_out),
            "queries_with_ties": float(sum(query.has_tie for query in self.queries)),
        }


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t; 0 of a single value."""
    count = len(values)
    if count == 1:
        return 0.0
    return float(stats.t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)


def held_out(train: Dataset, validation: Dataset) -> Dataset:
    """Encoded rows of one text each: the held-out rows as queries, documents of all rows.

    As `test_rows`: each positive is a document, and each text of a list; negatives are none.
    Labelled texts, which are alone in their row, are compared with the first `LABELLED` training
    rows; graded lists as `are_grades` says.
    """
    parts, others = parts_of(validation), parts_of(train)
    if len(parts[0]) == 1:
        labels = ([score for (score,) in rows["scores"]] for rows in (validation, train))
        texts = ([part for (part,) in each] for each in (parts, others))
        asked, known = (zip(a, b, strict=True) for a, b in zip(texts, labels, strict=True))
        return _rows(*alike(asked, islice(known, LABELLED)))
    if "scores" in validation.column_names:
        given = are_grades(validation["scores"])
        grades = [grades_of(scores, are_grades=given) for scores in validation["scores"]]
    else:
        parts, others = ([own[:2] for own in rows] for rows in (parts, others))
        grades = [[1.0]] * len(parts)
    queries, documents = judged(
        (own[0], [*zip(own[1:], each, strict=True)])
        for own, each in zip(parts, grades, strict=True)
    )
    for own in others:
        for part in own[1:]:
            documents.setdefault(part, f"d{len(documents)}")
    return _rows(queries, documents)


def parts_of(rows: Dataset) -> list[list[Tokens]]:
    """The tokens of each text of encoded rows."""
    found = []
    for ids, sizes in zip(rows["input_ids"], rows["sizes"], strict=True):
        ends = np.cumsum(sizes)
        found.append([tuple(ids[end - n : end]) for n, end in zip(sizes, ends, strict=True)])
    return found


def _rows(queries: Mapping[Tokens, Grades], documents: Mapping[Tokens, str]) -> Dataset:
    """Encoded rows of queries with the grades of documents, and of documents with their ids."""
    entries = [
        (part, QUERY, f"q{i}", json.dumps(own)) for i, (part, own) in enumerate(queries.items())
    ]
    entries += [(part, DOCUMENT, name, "{}") for part, name in documents.items()]
    parts, roles, ids, relevant = zip(*entries, strict=True)
    return Dataset.from_dict(
        {
            "input_ids": [list(part) for part in parts],
            "attention_mask": [[1] * len(part) for part in parts],
            "sizes": [[len(part)] for part in parts],
            "_role": list(roles),
            "_id": list(ids),
            "_relevant": list(relevant),
        }
    )
