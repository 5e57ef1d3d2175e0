"""Rows of several tasks: from a column to `task_ids` of a batch, and scores of each task."""

import json
import pickle

import pytest
from kept_runs import QUICK, lines
from training_fixtures import train

import petl
from petl.data.base import read_data
from petl.data.tasks.base import FILE, write_task
from petl.data.tasks.classification import Classification
from petl.data.tasks.row_tasks import of_tasks
from petl.data.tasks.task_file import read_task
from petl.errors import InputError, UnsupportedError
from petl.generation.inference.loading import load_language_model
from petl.training.compose import compose
from petl.training.runs.run_config import read_config

pytest_plugins = ["task_fixtures"]
NAMES = ["left", "right"]


@pytest.fixture(scope="module")
def run_of(families, tmp_path_factory):
    """Return the run of a task kind over two tasks, trained when it is asked for first, by kind."""
    folder, runs = tmp_path_factory.mktemp("row-tasks"), {}
    for name in ("train", "test"):
        rows = lines(families.folder / f"{name}.jsonl")
        # names and ids
        tasks = ("left", 1, "right", "0")
        more = [{**row, "kind": tasks[i % 4]} for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, more)))

    def run(kind):
        if kind not in runs:
            words = [f"data.{name}={folder}/{name}.jsonl" for name in ("train", "test")]
            words += ["data.task_column=kind", "method.tasks=[left,right]", "method.r=4"]
            given = [*families(kind, *QUICK), *words]
            given[given.index("+method=lora")] = "+method=polyhistor"
            runs[kind] = train(given, folder / kind)
        return runs[kind]

    run.folder = folder
    return run


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind",
    [
        "question_answering",
        *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("regression", "seq2seq")),
    ],
)
def test_each_kind_of_task_trains_scores_and_predicts_by_task(run_of, kind, tmp_path):
    run = run_of(kind)
    after, metric = run.scores["after"], read_task(run.path / "adapter").metric
    rows = lines(run_of.folder / "test.jsonl")
    kept = lines(run.path / "predictions.jsonl")
    assert {line["task"] for line in kept} == {*NAMES}
    for name in NAMES:
        ids = (name, NAMES.index(name), str(NAMES.index(name)))
        own = [row for row in rows if row["kind"] in ids]
        alone = petl.evaluate(run.path, own, out=tmp_path / name)
        # the regressions differ by 1e-4 between rows, of which rounding is a thousandth
        assert after[f"{name}_{metric}"] == pytest.approx(alone[metric], abs=1e-3)
        (loss,) = {"loss", "mse"} & alone.keys()
        assert after[f"{name}_{loss}"] == pytest.approx(alone[loss], abs=1e-4)
    assert petl.evaluate(run.path) == pytest.approx(
        {name: after[name] for name in petl.evaluate(run.path)}, abs=1e-4
    )


def test_predictions_depend_on_the_task_of_the_row(run_of):
    predictor = petl.Predictor.load(run_of("regression").path)
    rows = [{"text": "the red cat", "more": "red", "aim": name} for name in (*NAMES, 0, "1")]
    found = petl.predict(predictor, rows, columns={"task_column": "aim"})
    values = [row["prediction"] for row in found]
    assert values[0] == values[2] != values[1] == values[3]
    for wrong, column, words in (("up", "aim", "'up'.* left, right"), ("left", "kind", "'kind'")):
        with pytest.raises(InputError, match=words):
            petl.predict(predictor, [{**rows[0], "aim": wrong}], columns={"task_column": column})


@pytest.mark.thorough
def test_prompts_without_a_task_are_refused(run_of):
    with pytest.raises(UnsupportedError):
        load_language_model(run_of("causal_lm").path)


def test_a_task_is_saved_with_the_names_of_its_tasks(tmp_path):
    task = of_tasks(Classification(classes=["a", "b"]), NAMES)
    write_task(tmp_path, task)
    for copied in (read_task(tmp_path), pickle.loads(pickle.dumps(task))):
        assert type(copied) is type(task)
        assert isinstance(copied, Classification)
        assert copied.tasks == ("left", "right")
        assert copied == task
    saved = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**saved, "tasks": [3]}))
    with pytest.raises(InputError):
        read_task(tmp_path)


POLYHISTOR = ["+method=polyhistor", "data=files", "data.train=rows.jsonl"]


def test_tasks_of_the_data_are_those_of_the_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "a", "label": f"{i % 2}", "task": "ab"[i % 2]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = read_config(compose([*POLYHISTOR, "data.tasks=[a,b]"]))
    assert config.method["tasks"] == config.resolved["data"]["tasks"] == ["a", "b"]
    assert read_data(config.resolved["data"]).task.tasks == ("a", "b")
