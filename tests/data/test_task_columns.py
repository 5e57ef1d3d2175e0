"""The columns of each task under any names, and errors for invalid rows."""

import csv
import json
import re
import shlex
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from petl.data.base import read_data
from petl.errors import InputError
from petl.training.compose import compose


def read(folder, rows, task, **settings):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    given = {"name": "files", "source": "files", "train": str(file), "test": str(file)}
    return read_data({**given, "task": task, **settings})


def read_csv(folder, rows, task, **settings):
    file = folder / "rows.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows(rows)
    given = {"name": "files", "source": "files", "train": str(file), "test": str(file)}
    return read_data({**given, "task": task, **settings})


CONTEXT = "Ann met Bob, and Bob left."
SQUAD = {"text": ["Bob"], "answer_start": [17]}


def with_ids(count=40):
    """Rows with an id, a topic of four, a language of two, and a text."""
    rows = range(count)
    return [
        {
            "text": f"text {i}",
            "id": f"a{i}",
            "topic": "abcd"[i % 4],
            "lang": "xy"[i % 2],
            "v": i / 7,
        }
        for i in rows
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_for_each_row_is_refused_and_other_columns_are_named(tmp_path, streaming):
    with pytest.raises(InputError) as refused:
        read(tmp_path, with_ids(), "classification", label="id", streaming=streaming)
    assert str(refused.value).removeprefix(f"{tmp_path}/") == (
        "rows.jsonl has 40 classes for 40 labels in column 'id': too few examples of each to learn "
        "from; columns with fewer: 'lang' (2 values), 'topic' (4 values).\n"
        "If these are the classes, list them in data.labels"
    )


def test_a_class_for_each_row_is_read_where_the_classes_are_listed_or_the_rows_are_few(tmp_path):
    listed = [row["id"] for row in with_ids()]
    assert len(read(tmp_path, with_ids(), "classification", label="id", labels=listed).train) == 40
    assert len(read(tmp_path, with_ids(10), "classification", label="id").task.labels) == 10


def test_numbers_as_classes_are_said_to_be_for_regression(tmp_path):
    rows = [["text", "label"], *([f"text {i}", i / 7] for i in range(30))]
    with pytest.raises(InputError, match=r"data\.task="):
        read_csv(tmp_path, rows, "classification")


def test_pairs_of_texts_and_numbers_are_read(tmp_path):
    rows = [["a", "b", "score"], ["one", "two", "1.5"], ["three", "four", "-2"]]
    raw = read_csv(tmp_path, rows, "regression", text="a", text_pair="b", label="score")
    assert sorted(raw.train.to_list(), key=str) == [
        {"text": "one", "text_pair": "two", "label": 1.5},
        {"text": "three", "text_pair": "four", "label": -2.0},
    ]


def test_decimal_numbers_of_parquet_are_read(tmp_path):
    file = tmp_path / "rows.parquet"
    scores = pa.array([Decimal("1.50"), Decimal("-2")], pa.decimal128(5, 2))
    pq.write_table(pa.table({"text": ["a", "b"], "label": scores}), file)
    raw = read_data(
        {"name": "files", "source": "files", "train": str(file), "test": str(file)}
        | {"task": "regression"}
    )
    assert sorted(raw.train["label"]) == [-2.0, 1.5]


def test_words_and_tags_are_lists_or_strings_with_spaces(tmp_path):
    rows = [{"w": ["Ann", "is"], "t": ["B-PER", "O"]}, {"w": ["in", "Oslo"], "t": ["O", "B-LOC"]}]
    found = read(tmp_path, rows, "token_classification", tokens="w", tags="t")
    assert found.task.labels == ["B-LOC", "B-PER", "O"]
    table = [["w", "t"], *([" ".join(row["w"]), " ".join(row["t"])] for row in rows)]
    same = read_csv(tmp_path, table, "token_classification", tokens="w", tags="t")
    assert same.train.to_list() == found.train.to_list()
    # as JSON, Python and NumPy write lists in cells
    for written in (json.dumps, str, lambda words: str(np.array(words))):
        table = [["w", "t"], *([written(row["w"]), written(row["t"])] for row in rows)]
        cells = read_csv(tmp_path, table, "token_classification", tokens="w", tags="t")
        assert cells.train.to_list() == found.train.to_list()
    tags = ([1, 2], [2, 0])
    expected = [{"tokens": row["w"], "tags": t} for row, t in zip(rows, tags, strict=True)]
    assert sorted(found.train.to_list(), key=str) == sorted(expected, key=str)


def test_a_cell_that_begins_like_a_list_is_refused_unless_it_is_words(tmp_path):
    table = [["tokens", "tags"], ["[CLS] a , b [SEP]", "X O O O X"], ["[1] b", "O X"]]
    found = read_csv(tmp_path, table, "token_classification")
    assert ["[CLS]", "a", ",", "b", "[SEP]"] in found.train["tokens"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (SQUAD, [("Bob", 17)]),
        ([{"text": "Bob", "answer_start": 8}, {"text": "Ann"}], [("Bob", 8), ("Ann", 0)]),
        (json.dumps(SQUAD), [("Bob", 17)]),
        ("Ann", [("Ann", 0)]),
        (["left", "Bob left"], [("left", 21), ("Bob left", 17)]),
        ({"text": [], "answer_start": []}, []),
        ("", []),
        (None, []),
    ],
)
def test_answers_are_read_in_each_format(tmp_path, answers, expected):
    more = {"question": "?", "context": CONTEXT, "answers": "left"}
    rows = [{"question": "who?", "context": CONTEXT, "answers": answers}, more]
    raw = read(tmp_path, rows, "question_answering")
    (row,) = [row for row in raw.train if row["question"] == "who?"]
    assert list(zip(row["answers"], row["starts"], strict=True)) == expected
    assert raw.task.unanswerable == (not expected)
    assert sorted(raw.train["number"]) == [0, 1]


def test_the_start_of_an_answer_may_be_in_another_column(tmp_path):
    rows = [["question", "context", "answers", "at"], ["who?", CONTEXT, "Bob", "17"]]
    raw = read_csv(tmp_path, rows, "question_answering", answer_start="at")
    assert raw.train["starts"][0] == [17]


def test_starts_in_another_column_are_those_of_a_list_of_answers(tmp_path):
    asked = {"question": "who?", "context": "Bob saw Bob and Ann"}
    for answers, starts, expected in [
        (["Bob"], 8, [8]),  # one of several places, which a search would not tell
        (["Bob", "Ann"], [8, 16], [8, 16]),
        ('["Bob", "Ann"]', "[8, 16]", [8, 16]),
        ('["Bob"]', "8", [8]),
        (["Ann"], None, [16]),
        ([], None, []),
    ]:
        rows = [{**asked, "answers": answers, "at": starts}]
        assert (
            read(tmp_path, rows, "question_answering", answer_start="at").train["starts"][0]
            == expected
        )


def test_questions_and_answers_become_conversations(tmp_path):
    rows = [{"q": "how?", "a": "so"}]
    raw = read(tmp_path, rows, "causal_lm", prompt="q", answer="a", generate=8)
    assert (raw.task.chat, raw.task.generate) == (True, 8)
    assert raw.train["messages"][0] == [
        {"role": "user", "content": "how?"},
        {"role": "assistant", "content": "so"},
    ]


def test_texts_and_targets_are_read(tmp_path):
    raw = read(tmp_path, [{"en": "a", "de": "b"}], "seq2seq", text="en", target="de", prefix="x: ")
    assert raw.train.to_list() == [{"text": "a", "target": "b"}]
    assert raw.task.prefix == "x: "


def test_a_class_that_is_held_out_as_a_whole_is_said(tmp_path, petl_log):
    rows = [{"text": f"text {i}", "label": "rare" if i == 7 else "ab"[i % 2]} for i in range(20)]
    read(tmp_path, rows, "classification", test=None, seed=1)
    assert not petl_log.text
    for seed in range(9):
        raw = read(tmp_path, rows, "classification", test=None, test_share=0.4, seed=seed)
        is_unseen = 2 not in raw.train["label"]
        assert ("without a training row: 'rare'" in petl_log.text) == is_unseen
        petl_log.clear()


def test_labels_that_are_written_as_missing_are_counted_unless_they_are_listed(tmp_path, petl_log):
    table = [["text", "label"], *([f"text {i}", ("a", "b", "N/A")[i % 3]] for i in range(12))]
    read_csv(tmp_path, table, "classification", labels=["a", "b", "N/A"])
    assert "missing" not in petl_log.text
    read_csv(tmp_path, table, "classification")
    assert "4 training rows have the class 'N/A'" in petl_log.text


@pytest.mark.parametrize("task", ["classification", "multi_label"])
def test_equal_texts_with_different_labels_are_counted(tmp_path, petl_log, task):
    label = "ab" if task == "classification" else [["a"], ["a", "b"]]
    rows = [{"text": f"text {i % 150}", "label": label[i % 150 % 2]} for i in range(300)]
    read(tmp_path, rows, task)
    assert "another label" not in petl_log.text, "equal rows"
    rows[7]["label"] = label[0]
    read(tmp_path, rows, task)
    assert "another label" not in petl_log.text, "noise"
    for i in (1, 3, 5):
        rows[i]["label"] = label[0]
    read(tmp_path, rows, task)
    assert "8 of 300 training rows have the text of another row" in petl_log.text


def test_faults_of_all_rows_name_no_setting_that_would_leave_none(tmp_path):
    rows = [{"text": f"text {i}", "label": f"0,{i + 10}"} for i in range(4)]
    with pytest.raises(InputError) as refused:
        read(tmp_path, rows, "regression")
    assert "data.bad_rows" not in str(refused.value)


def test_columns_whose_names_are_no_words_are_named_as_they_are_typed(tmp_path):
    rows = [{"Review (EN)": f"text {i}", "label": "ab"[i % 2]} for i in range(4)]
    with pytest.raises(InputError) as refused:
        read(tmp_path, rows, "classification")
    word = re.search(r"such as (.*)$", str(refused.value))[1]
    assert shlex.split(word) == ['data.text="Review (EN)"']
    cfg = compose(["data=files", "data.train=x.csv", *shlex.split(word)])
    assert cfg.data.text == "Review (EN)"
