"""Losses of embedders, each a mean over the rows of a batch, in nats where it is an entropy.

They agree with those of sentence-transformers on the same vectors. Vectors need not have unit
length where a loss uses cosines.

Shapes: B rows, D numbers of a vector, n documents of a query.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from petl.errors import InputError

DISTANCES = ("euclidean", "cosine")  # of `triplet`


def in_batch(
    queries: Tensor,
    positives: Tensor,
    negatives: Sequence[Tensor] = (),
    *,
    scale: float = 20.0,
    symmetric: bool = False,
    keep: Tensor | None = None,
    margin: float | None = None,
) -> Tensor:
    """Return -mean_i log softmax_j(scale cos(q_i, d_j)) at the own positive d_i, a scalar.

    The documents are [positives; 1st negatives; 2nd ...]: those of other queries are negatives too.

    Args:
        queries, positives: [B, D].
        negatives: tensors [B, D].
        symmetric: True for the mean of this and the loss of each positive against all queries.
        keep: [B, B (1 + number of negatives)], False where a document is left out of the softmax of
            a query; the own positive never is.
        margin: documents with cos(q_i, d_j) > cos(q_i, d_i) - margin are left out; no gradient
            flows through this choice.
    """
    cosines = cosine_matrix(queries, torch.cat([positives, *negatives]))
    loss = _own_first(cosines, scale, keep, margin)
    if not symmetric:
        return loss
    count = len(queries)
    back = None if keep is None else keep[:, :count].T
    return (loss + _own_first(cosines[:, :count].T, scale, back, margin)) / 2


def _own_first(cosines: Tensor, scale: float, keep: Tensor | None, margin: float | None) -> Tensor:
    """Return the cross-entropy of rows [B, N] whose own column is that of their number."""
    own = torch.arange(len(cosines), device=cosines.device)
    out = torch.zeros_like(cosines, dtype=torch.bool) if keep is None else ~keep
    if margin is not None:
        fixed = cosines.detach()
        out = out | (fixed > fixed.diagonal()[:, None] - margin)
    out = out & ~torch.eye(*cosines.shape, dtype=torch.bool, device=cosines.device)
    return F.cross_entropy((scale * cosines).masked_fill(out, -torch.inf), own)


def triplet(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
) -> Tensor:
    """Return mean max(0, d(a, p) - d(a, n) + margin), a scalar.

    Args:
        anchors, positives, negatives: [B, D].
        distance: `euclidean`, or `cosine`: 1 - cos.

    Raises:
        InputError: another distance.
    """
    if distance not in DISTANCES:
        raise InputError(f"distance={distance!r} is none of {', '.join(DISTANCES)}")
    if distance == "euclidean":
        near, far = F.pairwise_distance(anchors, positives), F.pairwise_distance(anchors, negatives)
    else:
        near = 1 - F.cosine_similarity(anchors, positives)
        far = 1 - F.cosine_similarity(anchors, negatives)
    return F.relu(near - far + margin).mean()


def cosent(one: Tensor, other: Tensor, scores: Tensor, *, scale: float = 20.0) -> Tensor:
    """Return log(1 + sum over rows i, j with s_i > s_j of exp(scale (c_j - c_i))), a scalar.

    c are the cosines of the pairs: a pair with a higher score shall have a higher one.

    Args:
        one: vectors of the first sentences, [B, D].
        other: of the second, [B, D].
        scores: [B].
    """
    cosines = scale * _cosines(one, other)
    differences = cosines[None, :] - cosines[:, None]
    counted = differences[scores[:, None] > scores[None, :]]
    return torch.cat([counted.new_zeros(1), counted]).logsumexp(0)


def cosine(one: Tensor, other: Tensor, scores: Tensor) -> Tensor:
    """Return the mean squared difference of the cosines of pairs [B, D] and their scores [B]."""
    return (_cosines(one, other) - scores).square().mean()


def listwise(
    queries: Tensor, documents: Tensor, scores: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return tau^2 KL(softmax(scores / tau) || softmax(q.d / tau)), the mean over queries.

    Args:
        queries: [B, D].
        documents: [B, n, D].
        scores: of a teacher, or grades, [B, n]; -inf where a query has fewer documents.
    """
    missing = scores == -torch.inf
    found = torch.einsum("bd,bnd->bn", queries, documents) / temperature
    wanted = F.log_softmax(scores.to(found.dtype) / temperature, 1)
    log_ratio = wanted - F.log_softmax(found.masked_fill(missing, -torch.inf), 1)
    divergence = (wanted.exp() * log_ratio.masked_fill(missing, 0)).sum(1)
    return temperature**2 * divergence.mean()


def supervised(vectors: Tensor, labels: Tensor, *, scale: float = 20.0) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, L_out), a scalar.

    The mean over anchors i that share their label with other rows P_i of
    -1/|P_i| sum_p log(exp(scale c_ip) / sum_{a != i} exp(scale c_ia)). Without such an anchor it
    is 0.

    Args:
        vectors: [B, D].
        labels: [B].
    """
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    logits = (scale * cosine_matrix(vectors, vectors)).masked_fill(itself, -torch.inf)
    log_p = F.log_softmax(logits, 1).masked_fill(itself, 0)
    equal = (labels[:, None] == labels[None, :]) & ~itself
    counts = equal.sum(1)
    losses = -(log_p * equal).sum(1) / counts.clamp(min=1)
    return losses.sum() / (counts > 0).sum().clamp(min=1)


def matryoshka(
    loss: Callable[..., Tensor],
    dims: Sequence[int],
    *vectors: Tensor | Sequence[Tensor],
    **settings: object,
) -> Tensor:
    """Return the sum of a loss over widths: on vectors cut to each, and then normalized.

    The full width counts only if it is listed. So that a shorter vector can be used as well.

    Args:
        loss: of this module.
        dims: widths, falling.
        vectors: its arguments that are vectors, [..., D], or sequences of such.
        settings: its other arguments, by name.

    Raises:
        InputError: `dims` are not falling, or wider than the vectors.
    """
    first = vectors[0]
    full = (first if isinstance(first, Tensor) else first[0]).shape[-1]
    if (
        not dims
        or list(dims) != sorted({*dims}, reverse=True)
        or not 1 <= dims[-1] <= dims[0] <= full
    ):
        raise InputError(
            f"dims={list(dims)} must fall, from at most the {full} numbers of a vector to at least "
            "1, such as [384, 128, 32]"
        )
    parts = (loss(*(_cut(value, width) for value in vectors), **settings) for width in dims)
    return torch.stack(list(parts)).sum()


def _cut(value: Tensor | Sequence[Tensor], width: int) -> Tensor | list[Tensor]:
    if isinstance(value, Tensor):
        return F.normalize(value[..., :width], dim=-1)
    return [F.normalize(part[..., :width], dim=-1) for part in value]


def cosine_matrix(one: Tensor, other: Tensor) -> Tensor:
    """The cosines of all rows [B, D] with all rows [N, D]: [B, N]."""
    return F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """The cosines of rows with those of the same number, [B]."""
    return (F.normalize(one, dim=-1) * F.normalize(other, dim=-1)).sum(-1)
