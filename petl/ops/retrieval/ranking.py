"""Exact search by scalar products, and scores of rankings. Q queries, N documents."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from petl.errors import InputError

RECALLS = (1, 5, 10, 100)  # ranks at which recall is measured
CUTS = (1, 5, 10, 100)  # ranks at which some score ends


def top_k(
    queries: Tensor, documents: Tensor, k: int, *, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """Return the k largest scalar products of each query, and their rows: [Q, k] each.

    They are exact. Of equal ones, the smaller row comes first.

    Args:
        queries: [Q, D].
        documents: [N, D], on any device; such as of a memory map.
        k: at most N.
        chunk: rows of both that are multiplied at a time, which bounds the memory.

    Raises:
        InputError: k is not in 1..N, or a product is no number.
    """
    if not 1 <= k <= len(documents):
        raise InputError(f"k={k} is not in 1..{len(documents)}, the number of documents")
    found = [_best(part, documents, k, chunk) for part in queries.split(chunk)]
    scores, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not scores.isfinite().all():
        raise InputError("a scalar product of two vectors is not finite: nothing can be ranked")
    return scores, rows


Take = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # the largest of each row, their places
# of queries with some documents, of which the first has this number: [Q, N]
Products = Callable[[Tensor, int], Tensor]


def _best(queries: Tensor, documents: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Return what `top_k` does, of at most `chunk` queries."""

    def products(part: Tensor, start: int) -> Tensor:
        return queries @ part.to(queries).T

    # one more shows whether the last is tied with what is left out: which is taken is then open
    more = min(k + 1, len(documents))
    scores, rows = _merged(products, documents, more, chunk, _largest)
    tied = scores[:, k - 1] == scores[:, -1] if more > k else torch.zeros(0, dtype=torch.bool)
    scores, rows = scores[:, :k], rows[:, :k]
    if tied.any():
        # the same products, of all queries: of fewer, they could be rounded otherwise
        exact = _merged(lambda *part: products(*part)[tied], documents, k, chunk, _stable)
        scores[tied], rows[tied] = exact
    return _in_order(scores, rows)


class LeftOut(NamedTuple):
    """Documents that are no hard negatives.

    Attributes:
        known: a query and a document, in the order of documents, [P, 2].
        limits: larger products of a query are left out, [Q]; None: any are taken.
        skip: so many of the largest are left out, of those that are not known.
        copies: documents that are known for all queries, in order, [C]; None: none are.
    """

    known: Tensor
    limits: Tensor | None = None
    skip: int = 0
    copies: Tensor | None = None


def hardest(
    queries: Tensor,
    documents: Tensor,
    k: int,
    left_out: LeftOut,
    *,
    cosine: bool = False,
    chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Return the k largest products of each query with other documents, and their rows: [Q, k].

    Of fewer, the others are -inf. Of equal ones at the end, any is taken.

    Args:
        queries: [Q, D], as many as fit in memory with a chunk of documents.
        documents: [N, D], such as of a memory map.
        cosine: documents are normalized; queries are already.
        chunk: documents that are multiplied at a time.

    Raises:
        InputError: a product is no number.
    """
    above = torch.zeros(len(queries), dtype=torch.long)
    which, places_of_known = left_out.known.T.contiguous()
    limits, skip = left_out.limits, left_out.skip

    def products(part: Tensor, start: int) -> Tensor:
        # of a memory map, in half precision perhaps: here and not at once
        part = part.to(queries)
        found = queries @ (F.normalize(part, dim=-1) if cosine else part).T
        ends = torch.tensor([start, start + len(part)])
        if left_out.copies is not None:
            own = slice(*torch.searchsorted(left_out.copies, ends).tolist())
            found[:, left_out.copies[own] - start] = -torch.inf
        own = slice(*torch.searchsorted(places_of_known, ends).tolist())
        found[which[own], places_of_known[own] - start] = -torch.inf
        if limits is not None:
            # of the few queries that have some: `skip` counts them before they are lost
            beyond = (found.amax(1) > limits).nonzero().squeeze(1)
            part = found[beyond]
            out = part > limits[beyond, None]
            above[beyond] += out.sum(1)
            found[beyond] = part.masked_fill_(out, -torch.inf)
        return found

    # skipped ones may be above the limit, and are then none of these
    count = min(skip + k, len(documents))
    scores, rows = _in_order(*_merged(products, documents, count, chunk, _largest))
    if scores.isnan().any() or (scores == torch.inf).any():
        raise InputError("a scalar product of two vectors is not finite: nothing can be ranked")
    # what is above the limit is among the first as well
    places = (skip - above).clamp(min=0)[:, None] + torch.arange(k)
    inside = places.clamp(max=count - 1)
    scores = scores.gather(1, inside).masked_fill(places >= count, -torch.inf)
    return scores, rows.gather(1, inside)


def _merged(
    products: Products, documents: Tensor, k: int, chunk: int, take: Take
) -> tuple[Tensor, Tensor]:
    """Return scores and rows of the k best documents, of which each chunk leaves the best."""
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(documents), chunk):
        found = products(documents[start : start + chunk], start)
        scores, places = take(found, min(k, found.shape[1]))
        rows = places + start
        if best is not None:
            scores, rows = torch.cat([best[0], scores], 1), torch.cat([best[1], rows], 1)
            scores, places = take(scores, min(k, scores.shape[1]))
            rows = rows.gather(1, places)
        best = scores, rows
    assert best is not None, "there are documents"
    return best


def _in_order(scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest first, and of equal ones the smaller row."""
    rows, order = rows.sort(dim=1)
    ordered = scores.gather(1, order)
    scores, places = ordered.sort(dim=1, descending=True, stable=True)
    return scores, rows.gather(1, places)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, the largest first."""
    return values.topk(k)


def _stable(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, and of equal ones the first."""
    ordered, places = values.sort(dim=1, descending=True, stable=True)
    return ordered[:, :k], places[:, :k]


def metrics(
    ranked: Mapping[str, Sequence[str]], relevant: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Return the mean over queries of each score of `query_metrics`, and the number of queries.

    Queries without a relevant document are left out; `queries_left_out` counts them.

    Args:
        ranked: the documents of each query, best first, at least 100 where there are as many; []
            for a query without any: one that is not there has no part in the means.
        relevant: the grades of documents, by query; documents that are not there have grade 0.

    Raises:
        InputError: no query has a relevant document, a grade is below 0, or a document is ranked
            twice.
    """
    by_query = {
        query: query_metrics(documents, relevant[query])
        for query, documents in ranked.items()
        if any(grade > 0 for grade in _grades(relevant.get(query, {})).values())
    }
    if not by_query:
        raise InputError(f"none of the {len(ranked)} queries has a relevant document")
    values = list(by_query.values())
    count = len(values)
    means = {name: math.fsum(v[name] for v in values) / count for name in values[0]}
    return {**means, "queries": count, "queries_left_out": len(ranked) - count}


def query_metrics(documents: Sequence[str], grades: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of one query, of which at least one document has a grade above 0.

    `accuracy_at_1` is 1 if the first is relevant, `recall_at_k` the part of the relevant ones among
    the first k, `mrr_at_10` 1 / rank of the first hit, `ndcg_at_10` with the grade as gain, and
    `map_at_100` the sum of the precisions at hits / min(100, relevant).

    Raises:
        InputError: a grade is below 0, or a document is ranked twice.
    """
    if len({*documents}) < len(documents):
        raise InputError("a document is ranked twice for one query")
    grades = _grades(grades)
    gains = [grades.get(document, 0) for document in documents[: max(CUTS)]]
    ideal = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    hits = [rank for rank, gain in enumerate(gains, 1) if gain > 0]
    precisions = (number / rank for number, rank in enumerate(hits, 1))
    return {
        "accuracy_at_1": float(1 in hits),
        **{f"recall_at_{k}": sum(rank <= k for rank in hits) / len(ideal) for k in RECALLS},
        "mrr_at_10": 1 / hits[0] if hits and hits[0] <= 10 else 0.0,
        "ndcg_at_10": _discounted(gains[:10]) / _discounted(ideal[:10]),
        "map_at_100": math.fsum(precisions) / min(100, len(ideal)),
    }


def _grades(given: Mapping[str, float]) -> Mapping[str, float]:
    """The grades of documents, which are numbers from 0."""
    wrong = [grade for grade in given.values() if not 0 <= grade < math.inf]
    if wrong:
        raise InputError(f"a relevance grade is {wrong[0]}: they are numbers from 0")
    return given


def _discounted(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))
