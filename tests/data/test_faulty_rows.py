"""Rows that cannot be used: all named in one message, or left out and written beside the scores."""

import json
import re

import pytest
from training_fixtures import train

from petl.data.base import read_data
from petl.errors import InputError

pytest_plugins = ["training_fixtures"]
CSV = "text,label\n" + "".join(f"film {i},{'pos' if i % 2 else 'neg'}\n" for i in range(30))


def read(**settings):
    base = {"name": "files", "source": "files", "task": "classification", "max_length": 32}
    return read_data({**base, **settings})


@pytest.fixture
def dirty(tmp_path):
    """Two files with 38 rows, of which six cannot be used."""
    lines = CSV.splitlines()
    lines[4] = "no label"
    lines[9] = "film,"
    lines[13] = ",pos"
    lines[20] = "a,b,c"
    lines[29] = "film 28,"
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows = [{"text": f"other {i}", "label": "pos"} for i in range(8)]
    (tmp_path / "b.jsonl").write_text(
        "\n".join([*map(json.dumps, rows[:5]), "{", *map(json.dumps, rows[5:])])
    )
    return [str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")]


FAULTS = [  # by line of the files
    ("a.csv, line 5", "fields"), ("a.csv, line 10", "label is empty"),
    ("a.csv, line 14", "text is empty"), ("a.csv, line 21", "fields"),
    ("a.csv, line 30", "label is empty"), ("b.jsonl, line 6", "it is no valid JSON"),
]  # fmt: skip


def test_all_faults_are_in_one_message(dirty):
    with pytest.raises(InputError) as refused:
        read(train=dirty)
    message = str(refused.value)
    assert "6 of 39 rows cannot be used" in message
    for place, _ in FAULTS:
        assert place.rpartition(" ")[2] in message, place
    assert message.count("label is empty") == 1, "a kind has one line"
    assert "data.bad_rows=skip" in message


def test_a_bad_quote_costs_one_row_and_hides_no_other_fault(tmp_path):
    lines = CSV.splitlines()
    lines[4], lines[9] = '"not "quoted,pos', '"never closed,neg'
    lines[20], lines[25] = "film,", '"two\nlines",pos'
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(InputError) as refused:
        read(train=f"{tmp_path}/a.csv")
    assert all(re.search(rf"\b{line}\b", str(refused.value)) for line in (5, 10, 21))
    raw = read(train=f"{tmp_path}/a.csv", bad_rows="skip")
    assert [row.place.rpartition(" ")[2] for row in raw.skipped["training"]] == ["5", "10", "21"]
    texts = {*raw.train["text"], *raw.test["text"]}
    assert texts == {f"film {i}" for i in range(30)} - {
        "film 3",
        "film 8",
        "film 19",
        "film 24",
    } | {"two\nlines"}


def test_rows_that_are_left_out_leave_the_others_as_they_are(dirty, tmp_path):
    raw = read(train=dirty, bad_rows="skip", test_share=0.2)
    assert len(raw.train) + len(raw.test) == 33
    found = [(row.place.rpartition("/")[2], row.reason) for row in raw.skipped["training"]]
    assert [place for place, _ in found] == [place for place, _ in FAULTS]
    # the same as a file without them
    lines = [line for n, line in enumerate((tmp_path / "a.csv").read_text().splitlines(), 1)
             if n not in (5, 10, 14, 21, 30)]  # fmt: skip
    (tmp_path / "clean.csv").write_text("\n".join(lines))
    rows = [row for row in (tmp_path / "b.jsonl").read_text().splitlines() if row != "{"]
    (tmp_path / "clean.jsonl").write_text("\n".join(rows))
    clean = read(train=[str(tmp_path / "clean.csv"), str(tmp_path / "clean.jsonl")], test_share=0.2)
    assert raw.train.to_list() == clean.train.to_list()
    assert raw.test.to_list() == clean.test.to_list()


def test_json_rows_without_the_column_are_faults_unless_all_lack_it(tmp_path):
    rows = [{"text": f"film {i}", "label": str(i % 2)} for i in range(20)]
    del rows[0]["label"], rows[7]["text"]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    raw = read(train=str(file), bad_rows="skip", test_share=0.2)
    assert [row.place.rpartition(" ")[2] for row in raw.skipped["training"]] == ["1", "8"]
    file.write_text("\n".join(json.dumps({"text": f"film {i}"}) for i in range(1000)))
    with pytest.raises(InputError):
        read(train=str(file), bad_rows="skip", test_share=0.2)


def test_a_run_counts_and_keeps_them(tiny, tmp_path, petl_log):
    lines = (tiny.folder / "train.csv").read_text().splitlines()
    lines[3:3] = ["no label", "text,"]
    (tmp_path / "dirty.csv").write_text("\n".join(lines))
    words = [*tiny.steady, f"data.train={tmp_path}/dirty.csv", "data.bad_rows=skip"]
    run = train([*words, "+method=lora", "train.steps=1"], tmp_path / "run")
    assert run.scores["skipped_rows"] == {"training": 2}
    kept = [json.loads(line) for line in (run.path / "skipped.jsonl").read_text().splitlines()]
    assert [(row["split"], row["place"].rpartition(" ")[2], row["row"]) for row in kept] == [
        ("training", "4", None),
        ("training", "5", {"text": "text", "label": ""}),
    ]
    assert "2 training rows" in (run.path / "report.html").read_text()
    assert "2 of" in petl_log.text
