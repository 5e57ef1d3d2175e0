"""Exact search with ties, and scores of rankings beside those of sentence-transformers."""

import math

import pytest
import torch

from petl.errors import InputError
from petl.ops.retrieval import metrics, top_k
from petl.ops.retrieval.ranking import LeftOut, hardest, query_metrics


@pytest.mark.parametrize("chunk", [3, 7, 4096])
def test_top_k_is_the_sorted_product_with_ties_by_row(chunk):
    # small integers: products are exact, and many are equal
    queries = torch.randint(-2, 3, (9, 4)).float()
    documents = torch.randint(-2, 3, (40, 4)).float()
    scores, rows = top_k(queries, documents, 6, chunk=chunk)
    products = queries @ documents.T
    for i in range(9):
        expected = sorted(range(40), key=lambda j: (-float(products[i, j]), j))[:6]
        assert rows[i].tolist() == expected
        assert scores[i].tolist() == products[i, expected].tolist()


@pytest.mark.parametrize("chunk", [3, 7, 4096])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("skip", [0, 2, 8])
def test_hard_negatives_are_the_sorted_products_without_what_is_left_out(chunk, limited, skip):
    queries, documents = torch.randn(9, 4), torch.randn(23, 4)
    products = queries @ documents.T
    known = [(i, j) for j in range(23) for i in range(9) if (i + j) % 5 == 0]
    limits = products.median(1).values + 0.5 if limited else None
    copies = [2, 9, 22]
    left_out = LeftOut(torch.tensor(known), limits, skip, torch.tensor(copies))
    scores, rows = hardest(queries, documents, 4, left_out, chunk=chunk)
    for i in range(9):
        others = [j for j in range(23) if (i, j) not in known and j not in copies]
        ranked = sorted(others, key=lambda j: -products[i, j].item())[skip:]
        expected = [j for j in ranked if limits is None or products[i, j] <= limits[i]][:4]
        found = [j for j, s in zip(rows[i].tolist(), scores[i], strict=True) if s > -math.inf]
        assert found == expected
        torch.testing.assert_close(scores[i, : len(found)], products[i, expected])


def test_hard_negatives_by_cosine_and_all_of_them_left_out():
    queries = torch.nn.functional.normalize(torch.randn(2, 3), dim=1)
    documents = torch.tensor([[9.0, 0, 0], [0, 0.1, 0]])
    left_out = LeftOut(torch.tensor([[0, 0], [0, 1]]))
    scores, rows = hardest(queries, documents, 3, left_out, cosine=True)
    assert (scores[0] == -math.inf).all()
    axes = queries[1, :2]
    assert rows[1, :2].tolist() == axes.argsort(descending=True).tolist()
    torch.testing.assert_close(scores[1, :2], axes.sort(descending=True).values)
    assert scores[1, 2] == -math.inf
    with pytest.raises(InputError):
        hardest(queries, documents * math.nan, 1, left_out)


def test_top_k_gives_all_documents_if_asked_for():
    documents = torch.tensor([[1.0], [3.0], [2.0]])
    assert top_k(torch.ones(1, 1), documents, 3)[1].tolist() == [[1, 2, 0]]


def test_scores_of_one_query_by_hand():
    found = query_metrics(["a", "b", "c", "d"], {"b": 3, "d": 1, "e": 2, "x": 0})
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert found == pytest.approx(
        {
            "accuracy_at_1": 0,
            "recall_at_1": 0,
            "recall_at_5": 2 / 3,
            "recall_at_10": 2 / 3,
            "recall_at_100": 2 / 3,
            "mrr_at_10": 1 / 2,
            "ndcg_at_10": (3 / math.log2(3) + 1 / math.log2(5)) / ideal,
            "map_at_100": (1 / 2 + 2 / 4) / 3,
        }
    )


def test_hits_behind_a_cut_do_not_count():
    ranked = [f"d{i:03}" for i in range(200)]
    found = query_metrics(ranked, {"d010": 1, "d150": 1})
    assert found["mrr_at_10"] == found["ndcg_at_10"] == found["recall_at_10"] == 0
    assert found["recall_at_100"] == 0.5
    assert found["map_at_100"] == pytest.approx(1 / 11 / 2)


def test_queries_without_a_relevant_document_are_counted_and_left_out():
    found = metrics(
        {"1": ["a"], "2": ["a"], "3": ["a"]}, {"1": {"a": 1}, "2": {"a": 0}, "4": {"a": 1}}
    )
    assert found["accuracy_at_1"] == 1
    assert (found["queries"], found["queries_left_out"]) == (1, 2)


def test_scores_equal_those_of_sentence_transformers():
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    queries = {str(i): "" for i in range(20)}
    corpus = {str(i): "" for i in range(300)}
    relevant = {q: {str(int(d)) for d in torch.randint(300, (3,))} for q in queries}
    # few values, so that many scores are equal
    products = torch.randint(0, 40, (20, 300)).float()
    for q, documents in relevant.items():
        for number, d in enumerate(documents):
            products[int(q), int(d)] = 39 - 4 * number
    theirs = evaluation.InformationRetrievalEvaluator(
        queries, corpus, relevant, accuracy_at_k=[1], precision_recall_at_k=[1, 5, 10, 100]
    )
    hits = [
        [{"corpus_id": d, "score": float(products[int(q), int(d)])} for d in corpus]
        for q in theirs.queries_ids
    ]
    expected = theirs.compute_metrics(hits)
    order = sorted(corpus)  # ids as text, by which ties are broken
    places = torch.tensor([int(d) for d in order])
    eye = torch.eye(20)
    _, rows = top_k(eye, products[:, places].T.contiguous(), 100)
    ranked = {q: [order[row] for row in rows[int(q)]] for q in queries}
    found = metrics(ranked, {q: dict.fromkeys(ids, 1) for q, ids in relevant.items()})
    for name, value in found.items():
        if name.startswith("queries"):
            continue
        kind, _, cut = name.rpartition("_at_")
        assert value == pytest.approx(expected[f"{kind}@k"][int(cut)], abs=1e-9), name
