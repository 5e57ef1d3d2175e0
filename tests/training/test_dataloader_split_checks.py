"""Warnings about rows whose scores or labels say less than they seem to."""

import pytest
from datasets import Dataset
from training_fixtures import train

from petl.data.overlap import Overlap, TrainingInputs
from petl.data.tasks.classification import Classification
from petl.data.tasks.regression import Regression
from petl.data.tasks.retrieval import Retrieval
from petl.training.dataloader import warn_about_labels

pytest_plugins = ["training_fixtures"]

TASK = Classification(classes=["a", "b", "c"])


def labeled(*labels):
    return Dataset.from_dict({"labels": list(labels)})


@pytest.mark.parametrize(
    ("task", "splits", "said"),
    [
        (
            TASK,
            {"training": labeled(0, 0)},
            "all 2 training examples have the label a: there is no",
        ),
        (
            TASK,
            {"test": labeled(1, 1)},
            "all 2 test examples have the label b: scores on examples ",
        ),
        (
            TASK,
            {"validation": labeled(2)},
            "all 1 validation examples have the label c: scores on ",
        ),
        (
            Regression(),
            {"test": labeled(0.5, 0.5)},
            "label 0.5: a correlation is undefined, and co",
        ),
        (
            TASK,
            {"training": labeled(0, 1), "validation": None, "test": labeled(2, 0, 2)},
            "2 test examples have a class without training examples ('c')",
        ),
    ],
)
def test_labels_that_make_scores_meaningless_are_reported(petl_log, task, splits, said):
    warn_about_labels(task, splits)
    assert said in petl_log.text


def test_test_rows_that_are_training_rows_as_well_are_counted():
    train = Dataset.from_dict({"text": ["A cat.", "dogs", "dogs"], "label": [0, 1, 1]})
    test = Dataset.from_dict({"text": ["dogs", "a  CAT", "cat", "dogs"], "label": [0, 0, 0, 1]})
    assert TrainingInputs.of(TASK, train).overlap(test) == Overlap(4, 2, 1)


@pytest.mark.parametrize(("loss", "column"), [("supervised", "text"), ("in_batch", "query")])
def test_of_rows_to_rank_the_queries_are_compared(loss, column):
    train = Dataset.from_dict({column: ["what is 3", "b"], "positive": ["x", "y"]})
    texts = {"What is 3?": "query", "b": "document", "what is 3": "document", "c": "query"}
    test = Dataset.from_dict({"text": [*texts], "role": [*texts.values()]})
    assert TrainingInputs.of(Retrieval(loss=loss), train).overlap(test) == Overlap(2, 0, 1)


def test_ordinary_labels_are_not_reported(petl_log):
    warn_about_labels(TASK, {"training": labeled(0, 1, 2), "test": labeled(0, 1)})
    warn_about_labels(Regression(), {"test": labeled(0.5, 0.25)})
    assert petl_log.text == ""


@pytest.mark.cells(1)
@pytest.mark.parametrize("kind", ["classify", "complete"])
def test_truncated_test_rows_are_counted(tiny, tmp_path, petl_log, kind):
    words = [*getattr(tiny, kind), "+method=lora", "train.steps=1"]
    train(words, tmp_path / "whole")
    assert "are truncated to" not in petl_log.text
    train([*words, "data.max_length=4"], tmp_path / "cut")
    texts = (tiny.folder / "test.csv").read_text().splitlines()[1:]
    # [CLS] and [SEP] around the words; the end token of a Llama is [SEP]
    long = sum(len(text.rpartition(",")[0].split()) > 2 for text in texts)
    assert f"{long} of 20 test examples are truncated to data.max_length=4 tokens" in petl_log.text
