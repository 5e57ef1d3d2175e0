"""Files for retrieval: shapes of rows, test sets, and what is refused."""

import json
from pathlib import Path

import pytest

from petl.data.base import read_data
from petl.errors import InputError

PAIRS = [{"query": f"q{i}", "positive": f"d{i // 2}"} for i in range(8)]


def write(folder, name, rows) -> str:
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture
def read(tmp_path):
    def read(rows, test=None, **settings):
        if test is not None:
            settings["test"] = write(tmp_path, "test.jsonl", test)
        given = {"train": write(tmp_path, "train.jsonl", rows), "name": "x", "source": "files"}
        return read_data({**given, "task": "retrieval", **settings})

    return read


@pytest.mark.parametrize(
    ("row", "loss", "converted"),
    [
        ({"query": "q", "positive": "d", "id": 1}, "in_batch", {"query": "q", "positive": "d"}),
        (
            {"query": "q", "positive": "d", "negative": "n"},
            "in_batch",
            {"query": "q", "positive": "d", "negatives": ["n"]},
        ),
        (
            {"query": "q", "positive": "d", "negatives": ["n", "m"]},
            "in_batch",
            {"query": "q", "positive": "d", "negatives": ["n", "m"]},
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": "0.5"},
            "cosent",
            {"sentence1": "a", "sentence2": "b", "score": 0.5},
        ),
        (
            {"query": "q", "documents": ["a", "b"], "scores": [1, 0.5]},
            "listwise",
            {"query": "q", "documents": ["a", "b"], "scores": [1, 0.5]},
        ),
        ({"text": "t", "label": "x"}, "supervised", {"text": "t", "label": 0}),
    ],
)
def test_the_columns_tell_the_shape_and_its_loss(read, row, loss, converted):
    test = {**row, **({"query": "other"} if "query" in row else {})}
    data = read([row], [test])
    assert data.task.loss == loss
    assert data.train[0] == converted


def test_a_loss_chooses_among_shapes_and_columns_can_have_other_names(read):
    row = {"anchor": "q", "answer": "d", "wrong": "n"}
    named = {"query": "anchor", "positive": "answer", "negatives": "wrong"}
    data = read([row], [{**row, "anchor": "r"}], loss="triplet", **named)
    assert data.train[0] == {"query": "q", "positive": "d", "negatives": ["n"]}
    assert data.task.loss == "triplet"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("['n1', 'm1']", ["n1", "m1"]),
        (' [ "n1" ]', ["n1"]),
        ("[1] see the notes", ["[1] see the notes"]),
        ("[12]", ["[12]"]),
        ([], []),
        (" ", []),
        (None, []),
    ],
)
def test_negatives_of_a_cell_are_a_list_or_a_text(read, written, expected):
    row = {"query": "q", "positive": "d", "negatives": written}
    data = read([row, {**row, "negatives": ["m"]}], [{**row, "query": "r", "negatives": ["m"]}])
    assert expected in [each["negatives"] for each in data.train]


def scored(data, role) -> dict[str, str]:
    return {row["id"]: row["text"] for row in data.test if row["role"] == role}


def test_each_positive_is_a_document_and_equal_texts_are_one(read):
    data = read([{"query": "x", "positive": "y"}], [*PAIRS, {"query": "q0", "positive": "d3"}])
    documents = scored(data, "document")
    assert sorted(documents.values()) == ["d0", "d1", "d2", "d3"]
    grades = {
        row["text"]: {documents[name] for name in json.loads(row["relevant"])}
        for row in data.test
        if row["role"] == "query"
    }
    assert grades["q0"] == {"d0", "d3"}
    assert grades["q5"] == {"d2"}
    assert len(grades) == 8


def test_training_rows_with_a_test_query_are_left_out(read, caplog):
    data = read([*PAIRS, {"query": "own", "positive": "d0"}], PAIRS[:7])
    assert data.train["query"] == ["q7", "own"]
    assert "7 of 9 training rows have a query of the test rows" in caplog.text
    with pytest.raises(InputError):
        read(PAIRS, PAIRS)


def test_without_test_rows_some_queries_are_held_out(read):
    data = read([*PAIRS, *PAIRS], test_share=0.25)
    held = set(scored(data, "query").values())
    assert held
    assert not held & set(data.train["query"])


def test_held_out_queries_are_searched_among_the_positives_of_all_rows(read):
    rows = [{**row, "negatives": [f"n{i}"]} for i, row in enumerate(PAIRS)]
    documents = scored(read(rows, test_share=0.25), "document")
    assert sorted(documents.values()) == ["d0", "d1", "d2", "d3"]
    lists = [
        {"query": f"q{i}", "documents": [f"d{i}", f"e{i}"], "scores": [1, 0]} for i in range(8)
    ]
    assert len(scored(read(lists, test_share=0.25), "document")) == 16
    # those of a test file are its own
    assert len(scored(read(rows[:4], rows[4:6]), "document")) == 1


def test_all_positives_of_a_held_out_query_are_relevant(read):
    rows = [{"query": "one" if i else "other", "positive": f"d{i}"} for i in range(8)]
    data = read(rows, test_share=0.6)
    documents = scored(data, "document")
    grades = {row["text"]: json.loads(row["relevant"]) for row in data.test}
    assert {documents[name] for name in grades["one"]} == {f"d{i}" for i in range(1, 8)}


def test_queries_of_which_every_document_is_relevant_are_warned_of(read, caplog):
    read(PAIRS, test_share=0.25)
    assert "any model scores 1" not in caplog.text
    read([{**row, "positive": "d"} for row in PAIRS], test_share=0.25)
    assert "relevant for all 2 test queries (documents: 1)" in caplog.text


def test_rows_of_one_query_are_told_as_such(read):
    with pytest.raises(InputError):
        read([{**row, "query": "q"} for row in PAIRS], test_share=0.25)


def test_negatives_in_columns_with_numbers_are_joined(read):
    row = {"query": "q", "positive": "d", **{f"negative_{i}": f"n{i}" for i in (10, 1, 2)}}
    fewer = {"query": "p", "positive": "e", "negative_1": "n1", "negative": "n"}
    data = read([row, fewer], [{**row, "query": "r"}])
    assert sorted(data.train["negatives"]) == [["n", "n1"], ["n1", "n2", "n10"]]
    data = read([row], [{**row, "query": "r"}], task="reranking")
    assert data.train["negatives"] == [["n1", "n2", "n10"]]
    data = read([row], [{**row, "query": "r"}], negatives="negative_2")
    assert data.train["negatives"] == [["n2"]]


def test_the_first_text_may_be_called_anchor_as_in_sentence_transformers(read):
    row = {"anchor": "q", "positive": "d", "negative": "n"}
    data = read([row], [{**row, "anchor": "r"}])
    assert data.train[0] == {"query": "q", "positive": "d", "negatives": ["n"]}


def files(folder, corpus, queries, lines) -> dict[str, str]:
    (folder / "qrels.txt").write_text("\n".join(lines))
    return {
        "corpus": write(folder, "corpus.jsonl", corpus),
        "queries": write(folder, "queries.jsonl", queries),
        "qrels": str(folder / "qrels.txt"),
    }


CORPUS = [{"_id": "a", "text": "A"}, {"_id": "b", "text": "B"}]
QUERIES = [{"id": 7, "text": "seven"}, {"id": 8, "text": "q0"}]


def test_a_test_set_has_trecs_judgements(read, tmp_path):
    names = files(tmp_path, CORPUS, QUERIES, ["7 0 a 2", "7\t0\tb\t0", "", "8 0 b 1"])
    data = read(PAIRS, **names)
    assert scored(data, "document") == {"a": "A", "b": "B"}
    relevant = {row["id"]: json.loads(row["relevant"]) for row in data.test}
    assert relevant == {"7": {"a": 2, "b": 0}, "8": {"b": 1}, "a": {}, "b": {}}
    assert len(data.train) == 7  # q0 is a test query


def test_judgements_are_utf_8_with_or_without_its_mark(read, tmp_path):
    names = files(tmp_path, CORPUS, QUERIES, [])
    file = Path(names["qrels"])
    file.write_bytes(b"\xef\xbb\xbf7 0 a 1\r\n8 0 b 1\r\n")
    data = read(PAIRS, **names)
    assert {row["id"] for row in data.test if json.loads(row["relevant"])} == {"7", "8"}
    file.write_bytes(b"7 0 a 1\n7 0 \xe4 1\n")
    with pytest.raises(InputError, match=r"qrels\.txt, line 2"):
        read(PAIRS, **names)


RANKED = {"query": "q", "positive": "d", "negatives": ["n", "m"]}


@pytest.mark.parametrize(
    ("row", "loss", "pairs"),
    [
        (RANKED, "binary", False),
        ({"query": "q", "documents": ["a", "b"], "scores": [3, -0.5]}, "mse", False),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, "binary", True),
    ],
)
def test_the_columns_of_reranking_tell_the_loss(read, row, loss, pairs):
    test = {**row, **({"query": "other"} if "query" in row else {})}
    data = read([row], [test], task="reranking")
    assert (data.task.loss, data.task.scored_pairs) == (loss, pairs)
    assert data.train[0] == row


def test_the_judged_documents_of_a_test_set_are_ranked(read, tmp_path):
    names = files(tmp_path, CORPUS, QUERIES, ["7 0 a 2", "7 0 b 0", "8 0 b 1"])
    data = read([{**row, "negatives": ["x"]} for row in PAIRS], task="reranking", **names)
    found = {(r["query"], r["document"], r["document_id"], r["grade"]) for r in data.test}
    assert found == {("seven", "A", "a", 2), ("seven", "B", "b", 0), ("q0", "B", "b", 1)}
    assert len(data.train) == 7  # q0 is a test query


def test_positives_that_are_their_query_are_counted(read, caplog):
    read([*PAIRS, {"query": "d0", "positive": "d0"}], [{"query": "x", "positive": "y"}])
    assert "1 of 9 training rows have their query as positive" in caplog.text
    assert "nothing is learned" not in caplog.text
