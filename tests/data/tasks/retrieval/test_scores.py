"""Rankings of rows by their vectors, and the rows that validation scores."""

import json
import math

import pytest
import torch
from datasets import Dataset
from scipy import stats

from petl import retrieval
from petl.data.tasks.retrieval import Retrieval
from petl.data.tasks.retrieval.scores import Rankings, half_interval, held_out
from petl.errors import InputError


def table(documents: int, queries: int, grades) -> Dataset:
    ids = [f"d{i}" for i in range(documents)] + [f"q{i}" for i in range(queries)]
    return Dataset.from_dict(
        {
            "_role": ["document"] * documents + ["query"] * queries,
            "_id": ids,
            "_relevant": ["{}"] * documents + [json.dumps(each) for each in grades],
        }
    )


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_scores_are_those_of_sorted_similarities(similarity):
    vectors = torch.randn(38, 5)
    grades = [{f"d{3 * i}": 2, f"d{i + 1}": 1, "d29": 0} for i in range(7)] + [{}]
    rows = table(30, 8, grades)
    found = Rankings.of(vectors, rows, similarity).scores()
    ranked = {}
    for q in range(8):

        def near(d, q=q):
            value = vectors[30 + q] @ vectors[d]
            return value if similarity == "dot" else value / vectors[d].norm()

        ranked[f"q{q}"] = [f"d{d}" for d in sorted(range(30), key=near, reverse=True)]
    expected = retrieval.metrics(ranked, {f"q{q}": each for q, each in enumerate(grades)})
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_equally_near_documents_are_in_the_order_of_their_ids_as_text_and_counted():
    vectors = torch.cat([torch.ones(12, 2), torch.ones(1, 2)])
    found = Rankings.of(vectors, table(12, 1, [{"d10": 1}]), "cosine")
    assert found.queries[0].documents[:4] == ["d0", "d1", "d10", "d11"]
    assert found.queries[0].rank == 3
    assert found.scores()["queries_with_ties"] == 1


def test_the_interval_is_that_of_students_t():
    values = [0.0, 0.3, 1.0, 0.63]
    low, high = stats.t.interval(0.95, 3, sum(values) / 4, stats.sem(values))
    assert half_interval(values) == pytest.approx((high - low) / 2)
    assert half_interval([0.4]) == 0


def test_without_a_judged_query_there_is_no_score():
    with pytest.raises(InputError):
        Rankings.of(torch.ones(3, 2), table(2, 1, [{"d0": 0}]), "cosine")


def encoded(rows, tokenizer, **fields) -> Dataset:
    return Retrieval(max_length=64, **fields).encode(tokenizer, Dataset.from_list(rows))


def texts_of(rows: Dataset, role: str, tokenizer) -> dict[str, str]:
    return {row["_id"]: tokenizer.decode(row["input_ids"]) for row in rows if row["_role"] == role}


def test_held_out_queries_are_scored_among_the_documents_of_all_rows(tokenizer):
    train = encoded([{"query": "a", "positive": "A", "negatives": ["N"]}], tokenizer)
    held = encoded(
        [
            {"query": "b", "positive": "B", "negatives": ["A", "M"]},
            {"query": "b", "positive": "C", "negatives": ["B"]},
        ],
        tokenizer,
    )
    found = held_out(train, held)
    documents = texts_of(found, "document", tokenizer)
    # negatives are no documents, as in a test set of triples
    assert sorted(documents.values()) == ["A", "B", "C"]
    (query,) = (row for row in found if row["_role"] == "query")
    relevant = {documents[name]: grade for name, grade in json.loads(query["_relevant"]).items()}
    assert relevant == {"B": 1, "C": 1}


@pytest.mark.parametrize(
    ("scores", "relevant"), [([2.0, 0.0, 1.0], {"A": 2, "C": 1}), ([-0.5, 0.7, 0.2], {"B": 1})]
)
def test_whole_numbers_are_grades_and_of_a_teachers_scores_the_best_is(scores, relevant, tokenizer):
    row = {"query": "q", "documents": ["A", "B", "C"], "scores": scores}
    rows = encoded([row], tokenizer, loss="listwise")
    found = held_out(rows, rows)
    documents = texts_of(found, "document", tokenizer)
    (query,) = (row for row in found if row["_role"] == "query")
    grades = json.loads(query["_relevant"])
    assert {documents[name]: grade for name, grade in grades.items()} == relevant


def test_labelled_texts_are_compared_with_training_texts_of_their_label(tokenizer):
    train = encoded(
        [{"text": t, "label": i} for i, t in enumerate("ABA")], tokenizer, loss="supervised"
    )
    held = encoded([{"text": "q", "label": 2}], tokenizer, loss="supervised")
    found = held_out(train, held)
    documents = texts_of(found, "document", tokenizer)
    (query,) = (row for row in found if row["_role"] == "query")
    assert [documents[name] for name in json.loads(query["_relevant"])] == ["A"]


def test_scored_pairs_have_correlations():
    task = Retrieval(loss="cosent")
    assert task.metric == "spearman"
    values = torch.tensor([[0.1, 1.0], [0.9, 3.0], [0.5, 2.0]])
    found = task.summarize_rows(values, Dataset.from_dict({"sizes": [[1, 1]] * 3}))
    assert found["spearman"] == pytest.approx(1)
    pearson = stats.pearsonr([0.1, 0.9, 0.5], [1, 3, 2]).statistic
    assert found["pearson"] == pytest.approx(pearson, abs=1e-6)
    assert math.isclose(found["rows"], 3)
