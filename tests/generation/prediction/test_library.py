"""`petl.predict` and `petl.evaluate`: files and rows, as the commands."""

import json
import random

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from kept_runs import lines

import petl
from petl.adapters.export.saved_adapter import find
from petl.data.inputs import read_inputs
from petl.data.tasks.classification import Classification
from petl.data.tasks.token_classification import TokenClassification
from petl.errors import InputError
from petl.generation.prediction.files import PredictionFile, predict_files
from petl.generation.prediction.library import files_or_rows

pytest_plugins = ["task_fixtures", "kept_runs"]


@pytest.fixture(scope="module")
def predictor(kept_run):
    return petl.Predictor.load(kept_run("regression").path)


@pytest.mark.parametrize("form", [list, pd.DataFrame, Dataset.from_list, "file", "files"])
def test_rows_and_files_have_the_predictions_of_the_command(kept_run, predictor, tmp_path, form):
    rows = [{"review": f"the {word} cat", "more": word} for word in ("red", "old", "very very new")]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    saved, out = find(kept_run("regression").path), tmp_path / "out.jsonl"
    predict_files(saved, [str(file)], PredictionFile(out), ["data.text=review"])
    data = {"file": file, "files": [file]}.get(form) or form(rows)
    found = petl.predict(predictor, data, columns={"text": "review"}, batch_size=2)
    assert [row["prediction"] for row in found] == pytest.approx(
        [row["prediction"] for row in lines(out)], abs=1e-4
    )


def test_missing_values_and_lists_of_a_data_frame_are_those_of_a_file():
    table = pd.DataFrame({"title": ["a", None], "n": [1.0, float("nan")], "words": [["x"], ["y"]]})
    table.index = [7, 8]
    names, rows = files_or_rows(table)
    assert names == []
    assert rows == [
        {"title": "a", "n": 1.0, "words": ["x"]},
        {"title": None, "n": None, "words": ["y"]},
    ]
    with pytest.raises(InputError):
        files_or_rows(pd.DataFrame({"a": ["x", 1]}))


def test_values_of_numpy_are_read_as_pythons(predictor):
    rows = [{"text": "the cat", "more": "x"}]
    found = list(read_inputs([], predictor.task, {}, rows=rows, labels=False))
    words = TokenClassification(classes=["O", "X"])
    array = {"tokens": np.array(["a", "b"]), "score": np.float32(1.5)}
    ((raw, row),) = read_inputs([], words, {}, rows=[array])
    assert found[0][0] == rows[0]
    assert (raw, row) == ({"tokens": ["a", "b"], "score": 1.5}, {"tokens": ["a", "b"]})
    two = Classification(classes=["0", "1"])
    labeled = [{"text": "a", "label": np.int64(1)}]
    assert [row for _, row in read_inputs([], two, {}, rows=labeled, labels=True)] == [
        {"text": "a", "label": 1}
    ]


def test_the_accelerator_and_the_random_states_of_the_caller_stay(kept_run, families):
    run = kept_run("regression")
    for state in (AcceleratorState, GradientState):  # of other runs of this process
        state._reset_state()
    own = Accelerator(gradient_accumulation_steps=3, mixed_precision="bf16", cpu=True)
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    row = [{"text": "the cat", "more": "x"}]
    predictor = petl.Predictor.load(run.path)
    (found,) = petl.predict(predictor, row)
    petl.evaluate(run.path)
    assert (own.gradient_accumulation_steps, own.mixed_precision) == (3, "bf16")
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert np.random.get_state()[1].tolist() == random_states[2]
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    assert petl.predict(run.path, row) == [found]  # in float32, as the run


def test_a_limit_of_a_call_is_not_that_of_the_next(kept_run):
    predictor = petl.Predictor.load(kept_run("seq2seq").path)
    rows = [{"text": "the cat"}]
    (short,), (long,) = (petl.predict(predictor, rows, max_new_tokens=n) for n in (1, None))
    assert len(short["prediction"].split()) <= 1 < len(long["prediction"].split())


@pytest.mark.parametrize("limit", [{"batch_size": 0}, {"batch_size": -1}, {"max_new_tokens": 0}])
def test_limits_below_1_are_refused(kept_run, predictor, limit):
    ((name, value),) = limit.items()
    for run in (predictor, kept_run("regression").path):
        with pytest.raises(InputError, match=f"{name}={value}"):
            petl.predict(run, [{"text": "the cat"}], **limit)


def test_scores_of_rows_are_those_of_the_run(kept_run, families, tmp_path):
    run = kept_run("token_classification")
    rows = lines(families.folder / "test.jsonl")
    scores = petl.evaluate(run.path, rows, out=tmp_path / "out")
    after = run.scores["after"]
    assert scores == pytest.approx({name: after[name] for name in scores}, abs=1e-4)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores
    assert petl.evaluate(run.path) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data"),
        ({"text": "a"}, "one mapping"),
        ([{"text": "a", "more": "b"}, {"text": 3, "more": "b"}], "row 2: text"),
        ([{"txt": "a", "more": "b"}], "row 1 .*'text'.*txt, more"),
        ([{"text": "a", "more": "b"}, 3], "row 2 is 3"),
        ("gone.csv", "gone.csv"),
    ],
)
def test_wrong_data_are_refused(predictor, data, message):
    with pytest.raises(InputError, match=message):
        petl.predict(predictor, data)


def test_a_wrong_last_row_is_reported_before_the_first_is_predicted(predictor, monkeypatch):
    rows = [{"text": "the cat", "more": "x"}] * predictor.window + [{"more": "x"}]
    monkeypatch.setattr(petl.Predictor, "predict", lambda *_: pytest.fail("rows are predicted"))
    with pytest.raises(InputError, match=f"row {len(rows)} "):
        petl.predict(predictor, rows)


def test_a_setting_that_names_no_column_is_refused(predictor):
    with pytest.raises(InputError):
        petl.predict(predictor, [{"text": "a", "more": "b"}], columns={"labels": "a"})
