"""The section of ranking: its steps find what the products of all vectors have first."""

import pytest
import torch
from bench.ranking import measure, mining, plain, queries_near, scoring, vectors
from bench.records import Result
from bench.report import tables


def test_all_steps_rank_the_same_vectors(tmp_path):
    corpus = vectors(tmp_path / "v.npy", 5000)  # of more than one chunk
    asked = queries_near(corpus, 7)
    values, rows = plain(asked, corpus, 9)
    expected = torch.topk(asked @ corpus.T, 9)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(rows, expected.indices)
    # of each query the own document is the nearest, and no negative
    assert scoring(asked, corpus)().scores()["accuracy_at_1"] == 1
    cosines = torch.nn.functional.cosine_similarity(asked[:, None], corpus[None], dim=-1)
    cosines[range(7), range(7)] = -2
    assert torch.equal(mining(asked, corpus)()[1], cosines.topk(5).indices)


@pytest.mark.thorough
def test_rows_have_times_and_memory_in_a_table():
    found = measure(2, 300, 5, (400, 3))
    assert [record.row for record in found] == [
        *("top_k", "scores of a test set", "hard negatives", "hard negatives")
    ]
    assert all(record.facts["peak MB"] >= 0 for record in found)
    one, other = tables(Result({}, found)).values()
    assert len(one.rows) == 3
    assert len(other.rows) == 1
