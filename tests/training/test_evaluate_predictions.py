"""The predictions of the test examples that a run keeps."""

import pytest
from kept_runs import lines

from petl.training.runs.records import BEFORE, PREDICTIONS

pytest_plugins = ["task_fixtures", "kept_runs"]


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def test_numbers_are_kept_with_their_labels(kept_run, families):
    run = kept_run("regression")
    rows = lines(run.path / PREDICTIONS)
    assert [row["row"] for row in rows] == list(range(len(lines(families.folder / "test.jsonl"))))
    mse = sum((row["label"] - row["prediction"]) ** 2 for row in rows) / len(rows)
    assert mse == pytest.approx(run.scores["after"]["mse"], rel=1e-4)
    assert not (run.path / BEFORE).exists()


def test_spans_are_kept_with_their_place_and_scores(kept_run):
    run = kept_run("question_answering")
    rows, after = lines(run.path / PREDICTIONS), run.scores["after"]
    assert len(rows) == after["rows"]
    assert mean(rows, "exact_match") == pytest.approx(after["exact_match"])
    assert mean(rows, "f1") == pytest.approx(after["f1"])
    for row in rows:
        end = row["start"] + len(row["prediction"])
        assert row["context"][row["start"] : end] == row["prediction"]
        assert 0 < row["probability"] <= 1


def test_the_class_of_each_word_is_kept(kept_run):
    run = kept_run("token_classification")
    rows = lines(run.path / PREDICTIONS)
    pairs = [pair for row in rows for pair in zip(row["label"], row["prediction"], strict=True)]
    right = sum(label == prediction for label, prediction in pairs)
    assert right / len(pairs) == pytest.approx(run.scores["after"]["accuracy"])
    for row in rows:
        assert len(row["tokens"]) == len(row["prediction"]) == len(row["probability"])


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_answers_are_kept_before_and_after_training(kept_run, task):
    run = kept_run(task)
    for file, name in ((BEFORE, "before"), (PREDICTIONS, "after")):
        rows, scores = lines(run.path / file), run.scores[name]
        assert len(rows) == scores["answers"]
        assert mean(rows, "rougeL") == pytest.approx(scores["rougeL"], rel=1e-5)
        tokens = sum(row["tokens"] for row in rows)
        loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
        assert loss == pytest.approx(scores["loss"], rel=1e-4)
        assert tokens == scores["tokens"]
        assert {"label", "prediction", "messages" if task == "causal_lm" else "text"} <= {*rows[0]}


def test_the_report_shows_answers_before_and_after(kept_run):
    run = kept_run("seq2seq")
    page = (run.path / "report.html").read_text()
    row = lines(run.path / PREDICTIONS)[0]
    assert "<th>before training</th>" in page
    assert row["text"] in page
