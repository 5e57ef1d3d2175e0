"""Retrieval by vectors: losses of embedders, pooling, exact search, scores of rankings.

    import petl

    loss = petl.retrieval.in_batch(queries, positives)  # [B, D] each
    scores, rows = petl.retrieval.top_k(queries, documents, 10)

All are pure functions of tensors; `data.task=retrieval` trains and scores with them.
"""

from petl.ops.retrieval.cached import cached_step
from petl.ops.retrieval.losses import (
    cosent,
    cosine,
    in_batch,
    listwise,
    matryoshka,
    supervised,
    triplet,
)
from petl.ops.retrieval.pooling import pool
from petl.ops.retrieval.ranking import metrics, top_k

__all__ = [
    "cached_step",
    "cosent",
    "cosine",
    "in_batch",
    "listwise",
    "matryoshka",
    "metrics",
    "pool",
    "supervised",
    "top_k",
    "triplet",
]
