"""Scores by class, calibration and examples, from a file of predictions."""

import json
import random

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from petl.experiments.reports.predictions_section import BINS, TYPICAL, WORST, analyze

CLASSES = ["a", "b", "c"]


def predictions(count):
    draw = random.Random(0)
    for row in range(count):
        weights = [draw.random() ** 3 for _ in CLASSES]
        sure = {name: w / sum(weights) for name, w in zip(CLASSES, weights, strict=True)}
        best = max(sure, key=lambda name: sure[name])
        label = draw.choice([best, *CLASSES])
        yield {
            "row": row,
            "text": "x",
            "label": label,
            "prediction": best,
            "probability": sure[best],
            "probabilities": sure,
            "loss": -float(np.log(sure[label])),
        }


def written(folder, rows):
    file = folder / "predictions.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_scores_by_class_and_confusions_are_those_of_scikit_learn(tmp_path):
    rows = list(predictions(300))
    found = analyze(written(tmp_path, rows))
    labels, guesses = ([row[key] for row in rows] for key in ("label", "prediction"))
    expected = precision_recall_fscore_support(labels, guesses, labels=CLASSES)
    scores = [(c.precision, c.recall, c.f1, c.examples) for c in found.by_class()]
    assert np.array(scores) == pytest.approx(np.array(expected).T)
    matrix = [[found.confusion[a, b] for b in CLASSES] for a in CLASSES]
    assert matrix == confusion_matrix(labels, guesses, labels=CLASSES).tolist()


def test_the_calibration_error_is_the_weighted_distance_over_bins(tmp_path):
    rows = list(predictions(300))
    sure = np.array([row["probability"] for row in rows])
    right = np.array([row["label"] == row["prediction"] for row in rows])
    expected = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (sure >= low) & (sure < low + 1 / BINS)
        if inside.any():
            expected += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    assert analyze(written(tmp_path, rows)).calibration_error == pytest.approx(expected)


def test_worst_have_the_largest_loss_and_typical_that_in_the_middle(tmp_path):
    rows = list(predictions(300))
    found = analyze(written(tmp_path, rows))
    order = sorted(rows, key=lambda row: -row["loss"])
    assert [row["row"] for row in found.worst] == [row["row"] for row in order[:WORST]]
    middle = 150 - TYPICAL // 2
    assert [r["row"] for r in found.typical] == [r["row"] for r in order[middle:][:TYPICAL]]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"label": 1.0, "prediction": 1.5}, {"label": 1.0, "prediction": -3.0}),
        ({"rougeL": 0.5, "loss": 9.0}, {"rougeL": 0.1, "loss": 0.1}),
        ({"f1": 1.0, "exact_match": 1.0}, {"f1": 0.0, "exact_match": 0.0}),
        ({"loss": 2.0, "tokens": 3}, {"loss": 4.0, "tokens": 3}),
        (
            {"label": ["x", "y"], "prediction": ["x", "x"], "probability": [1.0, 0.5]},
            {"label": ["x", None], "prediction": ["y", None], "probability": [1.0, None]},
        ),
    ],
)
def test_each_task_has_its_worst_example(tmp_path, good, bad):
    rows = [{"row": 0, **good}, {"row": 1, **bad}, {"row": 2, "prediction": "unlabeled"}]
    found = analyze(written(tmp_path, rows))
    assert [row["row"] for row in found.worst] == [1, 0]
    assert found.rows == 3
