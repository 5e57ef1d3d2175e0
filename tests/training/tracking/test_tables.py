"""Tables of predictions for trackers, and the classes that no prediction has."""

import json

from petl.training.runs.predicted_classes import never_predicted
from petl.training.tracking import tables as tracked
from petl.training.tracking.tables import tables_of


def write(folder, *lines, name="predictions.jsonl"):
    (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def classified(row, label, prediction):
    values = {"probability": 0.5, "probabilities": {"a": 0.5, "b": 0.5}}
    return {"row": row, "text": "x" * 3000, "label": label, "prediction": prediction, **values}


def test_classes_have_a_table_of_predictions_and_the_confusion_matrix(tmp_path, monkeypatch):
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("b", "b")]
    write(tmp_path, *(classified(i, *pair) for i, pair in enumerate(pairs)))
    monkeypatch.setattr(tracked, "ROWS", 3)
    tables = tables_of(tmp_path)
    predictions = tables["predictions"]
    assert predictions.columns[:4] == ["row", "text", "label", "prediction"]
    assert len(predictions.rows) == 3  # bounded
    assert predictions.rows[1][0] == 1
    assert len(predictions.rows[0][1]) == tracked.LONGEST
    assert predictions.rows[0][-1] == '{"a": 0.5, "b": 0.5}'
    confusion = tables["confusion matrix"]  # of all rows
    assert (confusion.columns, confusion.rows) == (["label", "a", "b"], [["a", 1, 1], ["b", 0, 2]])


def test_classes_that_are_never_predicted_are_named_the_frequent_ones_first(tmp_path):
    file = tmp_path / "predictions.jsonl"
    assert never_predicted(file) == ""
    pairs = [("a", "a"), ("b", "a"), ("c", "a"), ("c", "a"), ("d", "d")]
    write(tmp_path, *(classified(i, *pair) for i, pair in enumerate(pairs)))
    assert never_predicted(file).startswith("never predicted, of 5 examples: c (2), b (1); ")
    assert "train.class_weights" in never_predicted(file, {"train": {"class_weights": None}})
    for settings in {"train": {"class_weights": {"b": 2.0}}}, {"data": {"sampling": "balanced"}}:
        assert "train.class_weights" not in never_predicted(file, settings)
    write(tmp_path, *(classified(i, *pair) for i, pair in enumerate(pairs[:1])))
    assert never_predicted(file) == ""
    write(tmp_path, *(classified(i, str(i), "x") for i in range(9)))
    assert "4 (1) and 4 more; " in never_predicted(file)


def test_generated_answers_stand_beside_those_before_training(tmp_path):
    write(tmp_path, {"row": 0, "prompt": "1+1", "label": "2", "prediction": "2", "exact_match": 1})
    write(tmp_path, {"row": 0, "prediction": "1"}, name="predictions_before.jsonl")
    tables = tables_of(tmp_path)
    assert list(tables) == ["predictions"]  # answers are no classes
    table = tables["predictions"]
    assert table.columns == ["row", "prompt", "label", "prediction", "exact_match", "before"]
    assert table.rows == [[0, "1+1", "2", "2", 1, "1"]]


def test_words_with_classes_are_counted_one_by_one(tmp_path):
    write(tmp_path, {"row": 0, "label": ["a", None, "b"], "prediction": ["a", "a", "a"]})
    confusion = tables_of(tmp_path)["confusion matrix"]
    assert confusion.rows == [["a", 1, 0], ["b", 1, 0]]


def test_a_run_without_predictions_has_no_tables(tmp_path):
    assert tables_of(tmp_path) == {}
    assert tables_of(write(tmp_path)) == {}
