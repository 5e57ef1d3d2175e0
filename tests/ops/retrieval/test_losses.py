"""Losses of embedders: each as a loop from its equation, and equal to sentence-transformers'."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.ops.retrieval import (
    cosent,
    cosine,
    in_batch,
    listwise,
    matryoshka,
    supervised,
    triplet,
)

B, D = 7, 12


def vectors(count: int, *shape: int) -> list[Tensor]:
    return [
        torch.randn(B, *shape, D, dtype=torch.float64, requires_grad=True) for _ in range(count)
    ]


def cos(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def agree(found, expected, given: list[Tensor], tolerance: float = 1e-9) -> None:
    """Values and gradients of two functions of the given tensors."""
    results = []
    for function in (found, expected):
        value = function(*given)
        results.append((value, *torch.autograd.grad(value, given)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def softmax_loss(q, documents, allowed, scale) -> Tensor:
    """-mean_i log softmax_j of the own document, over those that are allowed for i."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(q)):
        terms = [
            torch.exp(scale * cos(q[i], documents[j]))
            for j in range(len(documents))
            if j == i or allowed(i, j)
        ]
        total = total - torch.log(torch.exp(scale * cos(q[i], documents[i])) / sum(terms))
    return total / len(q)


def test_in_batch_is_the_softmax_over_all_documents():
    agree(
        lambda q, p, n1, n2: in_batch(q, p, [n1, n2], scale=9.0),
        lambda q, p, n1, n2: softmax_loss(q, [*p, *n1, *n2], lambda i, j: True, 9.0),
        vectors(4),
    )


def test_what_is_not_kept_is_in_no_softmax_and_the_own_positive_always_is():
    keep = torch.rand(B, 2 * B) > 0.4
    agree(
        lambda q, p, n: in_batch(q, p, [n], keep=keep),
        lambda q, p, n: softmax_loss(q, [*p, *n], lambda i, j: keep[i, j], 20.0),
        vectors(3),
    )


def test_negatives_nearer_than_the_margin_allows_are_left_out_without_gradient():
    def slow(q, p, n):
        documents = [*p, *n]

        def allowed(i, j):
            return cos(q[i], documents[j]) <= cos(q[i], p[i]) - 0.1

        return softmax_loss(q, documents, allowed, 20.0)

    agree(lambda q, p, n: in_batch(q, p, [n], margin=0.1), slow, vectors(3))


def test_symmetric_adds_each_positive_against_the_queries_alone():
    def slow(q, p, n):
        there = softmax_loss(q, [*p, *n], lambda i, j: True, 20.0)
        return (there + softmax_loss(p, [*q], lambda i, j: True, 20.0)) / 2

    agree(lambda q, p, n: in_batch(q, p, [n], symmetric=True), slow, vectors(3))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_triplet_is_the_hinge_of_two_distances(distance):
    def slow(a, p, n):
        def apart(x, y):
            return 1 - cos(x, y) if distance == "cosine" else (x - y + 1e-6).norm()

        rows = [F.relu(apart(a[i], p[i]) - apart(a[i], n[i]) + 1.3) for i in range(B)]
        return sum(rows) / B

    agree(partial(triplet, margin=1.3, distance=distance), slow, vectors(3))


def test_cosent_orders_each_two_pairs_with_unlike_scores():
    scores = torch.tensor([0.0, 1.0, 0.5, 0.5, 1.0, 0.2, 0.0])

    def slow(a, b):
        c = [cos(a[i], b[i]) for i in range(B)]
        pairs = [(i, j) for i in range(B) for j in range(B) if scores[i] > scores[j]]
        return torch.log(1 + sum(torch.exp(20 * (c[j] - c[i])) for i, j in pairs))

    agree(lambda a, b: cosent(a, b, scores), slow, vectors(2))


def test_cosine_is_the_squared_error_of_cosines():
    scores = torch.rand(B)

    def slow(a, b):
        return sum((cos(a[i], b[i]) - scores[i]) ** 2 for i in range(B)) / B

    agree(lambda a, b: cosine(a, b, scores), slow, vectors(2))


def test_listwise_is_the_divergence_from_the_teacher_over_documents_that_are_there():
    lengths = [1, 4, 3, 2, 4, 4, 2]
    scores = torch.full((B, 4), -math.inf, dtype=torch.float64)
    for row, length in enumerate(lengths):
        scores[row, :length] = torch.randn(length, dtype=torch.float64)

    def slow(q, d):
        total = torch.zeros((), dtype=torch.float64)
        for i, length in enumerate(lengths):
            p = torch.softmax(scores[i, :length] / 0.7, 0)
            found = torch.softmax(torch.stack([q[i] @ d[i, j] for j in range(length)]) / 0.7, 0)
            total = total + 0.7**2 * sum(p[j] * (p[j] / found[j]).log() for j in range(length))
        return total / B

    given = [*vectors(1), *vectors(1, 4)]
    agree(lambda q, d: listwise(q, d, scores, temperature=0.7), slow, given)


def test_supervised_pulls_rows_of_one_label_together():
    labels = [0, 1, 0, 2, 1, 0, 3]  # 2 and 3 have no second row

    def slow(v):
        terms = []
        for i in range(B):
            own = [p for p in range(B) if p != i and labels[p] == labels[i]]
            if own:
                below = sum(torch.exp(20 * cos(v[i], v[a])) for a in range(B) if a != i)
                logs = [torch.log(torch.exp(20 * cos(v[i], v[p])) / below) for p in own]
                terms.append(-sum(logs) / len(own))
        return sum(terms) / len(terms)

    agree(lambda v: supervised(v, torch.tensor(labels)), slow, vectors(1))


def test_supervised_without_a_second_row_of_any_label_is_zero_with_zero_gradients():
    (v,) = vectors(1)
    loss = supervised(v, torch.arange(B))
    assert loss == 0
    assert torch.autograd.grad(loss, v)[0].abs().max() == 0


def test_matryoshka_normalizes_what_it_has_cut():
    def slow(q, d):
        cut = [(F.normalize(q[..., :w], dim=-1), F.normalize(d[..., :w], dim=-1)) for w in (8, 3)]
        return sum(listwise(a, b, scores) for a, b in cut)

    scores = torch.randn(B, 4, dtype=torch.float64)
    given = [*vectors(1), *vectors(1, 4)]
    agree(lambda q, d: matryoshka(listwise, (8, 3), q, d, scores=scores), slow, given)


def of_sentence_transformers(name: str, **settings):
    """A loss of sentence-transformers as a function of vectors and labels."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    module = getattr(losses, name)(nn.Identity(), **settings)
    return lambda labels, *columns: module.compute_loss_from_embeddings(list(columns), labels)


SCORES, TEACHER = torch.rand(B).round(decimals=1), torch.randn(B, 3)
CASES = {
    "in_batch": (in_batch, "MultipleNegativesRankingLoss", 2, None),
    "negatives": (
        lambda q, p, *n: in_batch(q, p, n),
        "MultipleNegativesRankingLoss",
        4,
        None,
    ),
    "symmetric": (
        lambda q, p, *n: in_batch(q, p, n, symmetric=True),
        "MultipleNegativesRankingLoss",
        3,
        None,
    ),
    "triplet": (triplet, "TripletLoss", 3, None),
    "cosent": (lambda a, b: cosent(a, b, SCORES), "CoSENTLoss", 2, SCORES),
    "cosine": (lambda a, b: cosine(a, b, SCORES), "CosineSimilarityLoss", 2, SCORES),
    "listwise": (
        lambda q, *d: listwise(q, torch.stack(d, 1), TEACHER),
        "DistillKLDivLoss",
        4,
        TEACHER,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_those_of_sentence_transformers(case):
    own, name, count, labels = CASES[case]
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    theirs = of_sentence_transformers(name, **(both if case == "symmetric" else {}))
    given = [v.detach().float().requires_grad_() for v in vectors(count)]
    agree(own, partial(theirs, labels), given, tolerance=1e-6)


def test_matryoshka_equals_that_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    table = nn.ParameterList([v.detach().float() for v in vectors(3)])

    class Model(nn.Module):
        def forward(self, features):
            return {"sentence_embedding": table[int(features["number"])]}

        def get_embedding_dimension(self):
            return D

        _get_untruncated_embedding_dimension = get_embedding_dimension  # its name since 6.3

    model = Model()
    inner = losses.MultipleNegativesRankingLoss(model)
    theirs = losses.MatryoshkaLoss(model, inner, [12, 6, 2])
    columns = [{"number": torch.tensor(i)} for i in range(3)]
    agree(
        lambda q, p, n: matryoshka(in_batch, [12, 6, 2], q, p, [n]),
        lambda *_: theirs(columns, None),
        list(table),
        tolerance=1e-6,
    )
