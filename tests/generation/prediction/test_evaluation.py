"""`petl eval`: scores on files, predictions and tables in a folder, and a page."""

import csv
import json

import pytest
from kept_runs import lines

from petl.adapters.export.saved_adapter import find
from petl.cli import main
from petl.generation.prediction.evaluation import folder_of
from petl.training.runs.records import PREDICTIONS

pytest_plugins = ["task_fixtures", "kept_runs"]
TASKS = ("regression", "token_classification", "question_answering", "causal_lm", "seq2seq")


def evaluate(*words):
    return main.main(["eval", *map(str, words)])


@pytest.mark.cells(1)
@pytest.mark.parametrize("task", TASKS)
def test_scores_on_the_test_file_are_those_of_the_run(kept_run, families, task, tmp_path, capsys):
    run, out = kept_run(task), tmp_path / "out"
    assert evaluate(run.path, "--data", families.folder / "test.jsonl", "--out", out) == 0
    assert str(out / "index.html") in capsys.readouterr().err
    scores, after = json.loads((out / "scores.json").read_text()), run.scores["after"]
    assert scores == pytest.approx({name: after[name] for name in scores}, abs=1e-4)
    assert scores.keys() == after.keys()
    assert len(lines(out / PREDICTIONS)) == len(lines(run.path / PREDICTIONS))
    assert len(lines(out / "worst.jsonl")) > 0


def test_files_may_be_several_with_other_columns_and_labels_are_checked(
    kept_run, families, tmp_path, monkeypatch, capsys
):
    run = kept_run("token_classification")
    given = lines(families.folder / "test.jsonl")
    for name, part in (("a", given[:4]), ("b", given[4:])):
        rows = [{"words": row["tokens"], "kinds": row["tags"]} for row in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    columns = ["data.tokens=words", "data.tags=kinds"]
    assert evaluate(run.path, "--data", "a.jsonl", "b.jsonl", *columns) == 0
    folder = run.path / "eval-a-b"
    after = run.scores["after"]
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["accuracy"] == pytest.approx(after["accuracy"])
    table = {row["label"]: row for row in csv.DictReader((folder / "confusion.csv").open())}
    names = [name for name in next(iter(table.values())) if name != "label"]
    assert sum(int(table[a][b]) for a in names for b in names) == after["words"]
    capsys.readouterr()
    (tmp_path / "a.jsonl").write_text('{"tokens": ["x"], "tags": ["B-tool"]}\n')
    assert evaluate(run.path, "--data", "a.jsonl") == 2
    error = capsys.readouterr().err
    assert (
        "a.jsonl, line 1: tags has item 1 that is 'B-tool', which is none of the adapter's" in error
    )
    assert error.count("\n") == 1


def test_the_test_set_is_written_as_well_and_columns_are_refused_without_files(kept_run, capsys):
    run = kept_run("regression")
    assert evaluate(run.path) == 0
    assert lines(run.path / "eval-test" / PREDICTIONS) == lines(run.path / PREDICTIONS)
    assert evaluate(run.path, "data.text=review") == 2
    assert "data.text=review names columns of files: give them with --data" in (
        capsys.readouterr().err
    )


def test_each_data_has_a_folder_of_its_own(kept_run):
    saved = find(kept_run("regression").path)
    names = ["a/r.de.csv", "r.fr.csv", "r.csv.gz", "R.JSONL", "x/test.csv", "some.folder"]
    folders = [folder_of(saved, [name]).name for name in names]
    assert folders == [
        *("eval-r.de", "eval-r.fr", "eval-r", "eval-R", "eval-test-file", "eval-some.folder")
    ]
    assert folder_of(saved, []).name == "eval-test"


def test_the_model_writes_as_much_as_is_asked_for(kept_run, families, tmp_path):
    run, test = kept_run("causal_lm"), families.folder / "test.jsonl"
    out = tmp_path / "out"
    assert evaluate(run.path, "--data", test, "--out", out, "--max-new-tokens", "1") == 0
    assert all(len(row["prediction"].split()) <= 1 for row in lines(out / PREDICTIONS))
