"""Images and sounds are predicted and evaluated: files, folders, and those that tables name."""

import json

import pytest
from kept_runs import lines
from media_fixtures import AST, VIT, audio, images
from training_fixtures import train

import petl
from petl.cli import main
from petl.training.runs.records import PREDICTIONS

pytest_plugins = ["media_fixtures", "training_fixtures"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["images", pytest.param("audio", marks=pytest.mark.thorough)])
def test_files_are_predicted_as_in_the_run(kind, pictures, sounds, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    folder = pictures if kind == "images" else sounds
    words = [*VIT, *images(folder)] if kind == "images" else [*AST, *audio(folder)]
    run = train([*words, "+method=lora", "train.steps=2"], tmp_path / "run")
    kept = {row["path"]: row for row in lines(run.path / PREDICTIONS)}
    assert len(kept) == 6
    out = tmp_path / "out.jsonl"
    assert main.main(["predict", str(run.path), str(folder), "--out", str(out)]) == 0
    found = lines(out)
    assert [row["path"] for row in found] == sorted(kept)
    for row in found:
        expected = kept[row["path"]]
        assert row["prediction"] == expected["prediction"]
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
    table = tmp_path / "some.csv"
    table.write_text(f"id,path\n7,{found[4]['path']}\n")
    assert main.main(["predict", str(run.path), str(table), "--out", str(out)]) == 0
    (row,) = lines(out)
    assert row["id"] == "7"
    assert row["probability"] == pytest.approx(found[4]["probability"], abs=1e-4)
    (own,) = petl.predict(run.path, [{"path": found[4]["path"]}])
    assert own["probability"] == pytest.approx(found[4]["probability"], abs=1e-4)
    words = ["eval", str(run.path), "--data", str(folder), "--out", str(tmp_path / "eval")]
    assert main.main(words) == 0
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert scores == pytest.approx(run.scores["after"], abs=1e-4)
