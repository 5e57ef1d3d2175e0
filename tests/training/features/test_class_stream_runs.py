"""Runs over a stream of classes, and a finished adapter below the head that they train."""

import json

import pytest
import torch
from training_fixtures import train, train_until_killed

from petl.errors import InputError, UnsupportedError
from petl.experiments.reports.run_report import write_page
from petl.training.compose import compose
from petl.training.features.class_stream import stage_of
from petl.training.runs.run_config import read_config

pytest_plugins = ["training_fixtures"]

DKVB = ["+method=dkvb", "method.codebooks=8", "method.pairs=16", "method.key_dim=4"]
STREAM = ["data.order=by_class", "data.stream_repeats=2", "train.steps=null", "train.save_steps=4"]
LORA = ["+method=lora", "method.r=2", "train.steps=2", "train.score_before=false"]


def test_a_stage_has_the_accuracy_of_each_class():
    confusion = torch.tensor([[3.0, 1, 0], [0, 0, 0], [2, 2, 4]])
    stage = stage_of(torch.cat([torch.tensor([9.9]), confusion.flatten()]), ["a", "b", "c"], 7, 2)
    assert stage == {
        "step": 7,
        "trained": "c",
        "accuracy": 7 / 12,
        "by_class": {"a": 0.75, "b": None, "c": 0.5},
    }


@pytest.mark.thorough
def test_a_stream_is_scored_after_each_class_and_resumes_bit_exactly(tiny, tmp_path):
    words = [*tiny.classify, *DKVB, *STREAM]
    run = train(words, tmp_path / "straight")
    stages = json.loads((run.path / "stages.json").read_text())
    assert len(stages) == 3
    assert [stage["trained"] for stage in stages] == ["beast", "color", "tool"]
    scores = run.scores
    assert scores["steps"] == stages[-1]["step"]
    last, best = stages[-1]["by_class"], {}
    for name in last:
        best[name] = max(stage["by_class"][name] for stage in stages)
    assert scores["stream"]["stages"] == 3
    assert scores["stream"]["average_accuracy"] == pytest.approx(sum(last.values()) / 3)
    lost = sum(best[name] - last[name] for name in last) / 3
    assert scores["stream"]["forgetting"] == pytest.approx(lost)
    assert stages[-1]["accuracy"] == pytest.approx(scores["after"]["accuracy"])
    assert (run.path / "class_stream.png").read_bytes().startswith(b"\x89PNG")
    page = write_page(run.path).read_text()
    assert "Classes one after the other" in page
    assert "Forgetting" in page
    # killed after the second stage was scored, before the next checkpoint
    killed = tmp_path / "killed"
    train_until_killed(words, killed, stages[1]["step"] + 1)
    resumed = train([*words, "train.resume=auto"], killed)
    assert resumed.adapter.keys() == run.adapter.keys()
    for name, tensor in run.adapter.items():
        assert torch.equal(resumed.adapter[name], tensor), name
    assert json.loads((killed / "stages.json").read_text()) == stages
    assert resumed.scores["stream"] == scores["stream"]


@pytest.mark.thorough
def test_a_finished_adapter_is_merged_below_the_head(tiny, tmp_path):
    first = train([*tiny.steady, *LORA], tmp_path / "first")
    below = f"model.adapter={first.path}"
    run = train([*tiny.steady, *DKVB, below], tmp_path / "second")
    assert {name.rpartition(".")[2] for name in run.adapter} == {"values", "keys", "projection"}
    # keys come from the adapted encoder
    plain = train([*tiny.steady, *DKVB], tmp_path / "plain")
    keys = next(name for name in run.adapter if name.endswith("keys"))
    assert not torch.equal(run.adapter[keys], plain.adapter[keys])
    # the head of the adapter came along: before training, the model is the finished one
    again = train([*tiny.steady, *LORA, below, "train.score_before=true"], tmp_path / "third")
    assert again.scores["before"]["loss"] == pytest.approx(first.scores["after"]["loss"], abs=1e-5)


def test_an_adapter_that_cannot_be_below_is_refused(tiny, tmp_path):
    base = [*tiny.steady, *DKVB]
    words = ["+method=mola", "method.r=2", "method.num_experts=2", "train.score_before=false"]
    mola = train([*tiny.steady, *words, "train.steps=1"], tmp_path / "mola")
    with pytest.raises(UnsupportedError):
        read_config(compose([*base, f"model.adapter={mola.path}"]))


def test_rows_without_classes_have_no_stream(tiny, tmp_path):
    words = [*tiny.complete, "+method=lora", "data.order=by_class", "train.steps=null"]
    with pytest.raises(InputError):
        train(words, tmp_path / "run")
