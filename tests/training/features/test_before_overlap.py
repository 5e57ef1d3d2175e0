"""Test rows that are training rows, from the files to scores.json and the page."""

import json
import random
import re

import pytest
from training_fixtures import train

from petl.cli import main
from petl.data.base import read_data
from petl.data.overlap import TrainingInputs

pytest_plugins = ["training_fixtures"]


@pytest.fixture
def leaking(tiny, tmp_path):
    """Words of a run whose 10 test rows are training rows: 6 exactly, 4 in other letters."""
    header, *lines = (tiny.folder / "train.csv").read_text().splitlines()
    rows = lines[:6] + [line[0].upper() + line[1:].replace(" ", "  ") for line in lines[6:10]]
    (tmp_path / "leaking.csv").write_text("\n".join([header, *rows, ""]))
    return [*tiny.steady, f"data.test={tmp_path}/leaking.csv", "+method=lora", "train.steps=1"]


def test_a_test_set_of_training_rows_is_refused_before_the_model_is_loaded(
    leaking, tmp_path, capsys
):
    with pytest.raises(ValueError, match=r"10 of 10 .*4"):
        train(leaking, tmp_path / "run")
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.thorough
def test_it_is_counted_everywhere_if_it_is_allowed(leaking, tmp_path, capsys, petl_log):
    words = [*leaking, "data.allow_overlap=true"]
    run = train(words, tmp_path / "run")
    assert run.scores["test_rows_in_training"] == {"rows": 10, "exact": 6, "alike": 4}
    assert "10 of 10 test rows occur in training" in petl_log.text
    assert "10 of 10 test rows occur in training" in (run.path / "report.html").read_text()
    capsys.readouterr()
    assert main.main(["data", *(word for word in leaking if not word.startswith("+"))]) == 0
    assert "10 of 10 test rows occur in training" in capsys.readouterr().out


def test_near_rows_are_counted_on_request():
    train = ["the old red cat sat on the mat and saw a dog", "something else is written here"]
    test = ["the old red cat sat on the mat and saw a pig", "nothing of the kind, at all", train[1]]
    assert TrainingInputs(train).compare(test).entry() == {"rows": 3, "exact": 1, "alike": 0}
    pytest.importorskip("datasketch")
    found = TrainingInputs(train, 0.6).compare(test)
    assert (found.exact, found.near, found.found) == (1, 1, 2)
    assert TrainingInputs(train, 0.95).compare(test).near == 0


@pytest.mark.thorough
def test_a_run_counts_near_rows(leaking, tmp_path):
    pytest.importorskip("datasketch", reason="pip install 'petl-peft[near]'")
    words = [*leaking, "data.allow_overlap=true", "data.near_duplicates=0.5"]
    found = train(words, tmp_path / "run").scores["test_rows_in_training"]
    assert found["near"] is not None


def test_a_random_split_has_no_row_on_both_sides(tmp_path):
    texts = [f"text number {i % 10}" + "!" * (i % 2) for i in range(100)]
    random.Random(0).shuffle(texts)
    lines = [json.dumps({"text": text, "label": text[12]}) for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    words = {"name": "rows", "source": "files", "train": str(tmp_path / "rows.jsonl")}
    data = read_data({**words, "test_share": 0.2})
    sides = [{text.rstrip("!") for text in rows["text"]} for rows in (data.train, data.test)]
    assert not sides[0] & sides[1]
    assert (len(data.train), len(data.test)) == (80, 20)


TURNS = [{"role": "user", "content": "q{}"}, {"role": "assistant", "content": "a{}"}]


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ({"prompt": "q{}", "chosen": "a{}", "rejected": "b{}"}, {"task": "dpo"}),
        ({"prompt": "q{}", "completion": "a{}", "label": 1}, {"task": "kto"}),
        ({"prompt": "q{}", "answer": "a{}"}, {"task": "grpo"}),
        ({"messages": TURNS}, {"task": "causal_lm"}),
        ({"query": "q{}", "positive": "a{}"}, {"task": "retrieval"}),
        (
            {"chosen": "ask q{}: so a{}", "rejected": "ask q{}: so b{}"},
            {"task": "dpo", "objective": {"name": "dpo", "plain": True}},
        ),
    ],
    ids=["pairs", "rated", "rewards", "chat", "queries", "fused"],
)
def test_a_random_split_has_no_prompt_on_both_sides(tmp_path, row, more):
    lines = [
        json.dumps(row).replace("q{}", f"question{i // 4}").replace("a{}", f"a{i}")
        for i in range(80)
    ]
    lines = [line.replace("so ", "") if i % 4 else line for i, line in enumerate(lines)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    words = {"name": "rows", "source": "files", "train": str(tmp_path / "rows.jsonl")}
    data = read_data({**words, "test_share": 0.2, **more})
    sides = [{*re.findall(r"question\d+", json.dumps(rows[:]))} for rows in (data.train, data.test)]
    assert all(sides)
    assert not sides[0] & sides[1]
