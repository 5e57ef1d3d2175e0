"""The predictions of the test examples that a run keeps."""

import json

import pytest
from training_fixtures import train

from petl.runs.records import BEFORE, PREDICTIONS

pytest_plugins = ["task_fixtures"]
QUICK = ("+method=lora", "train.steps=2", "train.eval_steps=null", "train.linear_probe=false")


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize("task", ["regression", "token_classification", "question_answering"])
def test_a_run_keeps_the_prediction_of_each_test_row(families, task, tmp_path):
    run = train([*families(task, *QUICK), "train.validation_share=null"], tmp_path / "run")
    rows, after = lines(run.path / PREDICTIONS), run.scores["after"]
    given = lines(families.folder / "test.jsonl")
    assert sorted(row["row"] for row in rows) == list(range(len(given)))
    if task == "regression":
        mse = sum((row["label"] - row["prediction"]) ** 2 for row in rows) / len(rows)
        assert mse == pytest.approx(after["mse"], rel=1e-4)
    if task == "question_answering":
        assert mean(rows, "exact_match") == pytest.approx(after["exact_match"])
        assert mean(rows, "f1") == pytest.approx(after["f1"])
        for row in rows:
            end = row["start"] + len(row["prediction"])
            assert row["context"][row["start"] : end] == row["prediction"]
            assert 0 < row["probability"] <= 1
    if task == "token_classification":
        pairs = [pair for row in rows for pair in zip(row["label"], row["prediction"], strict=True)]
        assert sum(a == b for a, b in pairs) / len(pairs) == pytest.approx(after["accuracy"])
        assert all(len(row["tokens"]) == len(row["prediction"]) for row in rows)
    assert not (run.path / BEFORE).exists()


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_answers_are_kept_before_and_after_training(families, task, tmp_path):
    run = train([*families(task, *QUICK), "train.validation_share=null"], tmp_path / "run")
    for file, name in ((BEFORE, "before"), (PREDICTIONS, "after")):
        rows, scores = lines(run.path / file), run.scores[name]
        assert mean(rows, "rougeL") == pytest.approx(scores["rougeL"], rel=1e-5)
        tokens = sum(row["tokens"] for row in rows)
        loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
        assert loss == pytest.approx(scores["loss"], rel=1e-4)
        assert tokens == scores["tokens"]
        assert {"label", "prediction", "messages" if task == "causal_lm" else "text"} <= {*rows[0]}
