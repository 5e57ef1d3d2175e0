"""Ranks by importance in runs of train.py: what is written, resumed, planned and refused."""

import json
import re
import shutil

import pytest
import torch
from training_fixtures import stopped_before, train

from petl.errors import InputError
from petl.experiments.planning.plan import plan_run
from petl.experiments.reports.run_report import write_page
from petl.training.compose import compose
from petl.training.ranks import file as ranks_file
from petl.training.ranks import run as module

pytest_plugins = ["training_fixtures"]

# blocks of a random model are nearly equal, which a large power undoes
LORA = ["+method=lora", "method.r=3", "+ranks=cfsp", "ranks.num_samples=6", "ranks.power=40"]


def saved(run, name="adapter_config.json"):
    return json.loads((run.path / "adapter" / name).read_text())


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "run"
    return train([*tiny.complete, *LORA, "ranks.metric=mse"], folder)


def test_a_run_trains_with_the_ranks_that_it_measured(run):
    written = json.loads((run.path / "ranks.json").read_text())
    ranks = {block["path"]: block["rank"] for block in written["blocks"]}
    assert (written["metric"], written["mean"]) == ("mse", 3)
    assert written["calibration"]["num_samples"] == 6
    assert sum(ranks.values()) == 3 * len(ranks)
    largest = max(written["blocks"], key=lambda block: block["importance"])
    assert largest["rank"] == max(ranks.values()) > 3
    for path, rank in ranks.items():
        A = [t for name, t in run.adapter.items() if f".{path}." in name and "lora_A" in name]
        assert {len(tensor) for tensor in A} == {rank}
    assert saved(run)["rank_pattern"] == {rf"{re.escape(path)}\..*": r for path, r in ranks.items()}
    page = (run.path / "report.html").read_text()
    assert "Ranks by importance" in page
    assert all(f"{path}\nrank: {rank}\n" in page for path, rank in ranks.items())
    assert (run.path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_a_resumed_run_has_its_ranks_again_and_measures_nothing(tiny, tmp_path, monkeypatch):
    common = [*tiny.complete, *LORA, "train.save_steps=2"]
    whole = train(common, tmp_path / "whole")
    half = stopped_before(whole, tmp_path / "half", "step-000004")
    monkeypatch.setattr(module, "block_importance", None)  # calling it would raise
    train([*common, f"train.resume={half.path}/checkpoints/step-000002"], half.path)
    assert saved(half)["rank_pattern"] == saved(whole)["rank_pattern"]
    for name, tensor in whole.adapter.items():
        assert torch.equal(half.adapter[name], tensor), name
    assert (half.path / "ranks.json").read_text() == (whole.path / "ranks.json").read_text()


@pytest.mark.thorough
def test_the_ranks_spread_the_size_that_the_budget_chose(tiny, tmp_path):
    words = ["+method=adapter", "+ranks=cfsp", "ranks.budget=params", "ranks.power=40"]
    words += ["train.budget=3000"]
    run = train([*tiny.classify, *words], tmp_path / "run")
    scores = json.loads((run.path / "scores.json").read_text())
    mean = json.loads((run.path / "ranks.json").read_text())["mean"]
    assert 3000 - 3000 / mean < scores["adapter_parameters"] <= 3000
    assert len(set(saved(run)["rank_pattern"].values())) > 1


@pytest.mark.thorough
def test_blocks_without_targets_have_no_rank(tiny, tmp_path):
    words = [*LORA, "method.layers_to_transform=[1]", "method.target_modules=[q_proj]"]
    run = train([*tiny.complete, *words], tmp_path / "run")
    blocks = json.loads((run.path / "ranks.json").read_text())["blocks"]
    assert [block["rank"] for block in blocks] == [
        3 if i == 1 else None for i in range(len(blocks))
    ]


@pytest.mark.thorough
def test_a_plan_says_that_ranks_come_from_data_and_shows_the_mean(tiny):
    plan = plan_run(compose([*tiny.complete, *LORA]))
    assert any("come from data (ranks=cfsp), with the mean 3" in note for note in plan.notes)
    plan = plan_run(compose([*tiny.classify, "+method=adapter", "+ranks=cfsp"]))
    bottleneck = 32 // 16  # width of the tiny BERT, by the default reduction
    assert any(f"with the mean {bottleneck};" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+method=lora", "ranks.least=9"], "least=9 .*8"),
        (["+method=lora", "ranks.most=7"], "most=7 .*8"),
        (["+method=sparse"], "method.r=null"),
        (["+method=lora", "method.target_modules=[pooler.dense]"], "target"),
    ],
)
def test_what_has_no_ranks_stops_before_weights_are_loaded(words, message, tiny):
    with pytest.raises(InputError, match=message):
        plan_run(compose([*tiny.classify, "+ranks=cfsp", *words]))


BLOCK = {"path": "model.layers.0", "importance": 0.2, "rank": 3}
GOOD = {
    "metric": "angular",
    "mean": 3,
    "calibration": {"data": None, "num_samples": 1, "seq_len": 2},
    "blocks": [BLOCK],
}


@pytest.mark.parametrize(
    "changed",
    [
        {"blocks": []},
        {"blocks": [BLOCK] * 3000},
        {"blocks": [{**BLOCK, "importance": float("nan")}]},
        {"blocks": [{**BLOCK, "importance": -1}]},
        {"blocks": [{**BLOCK, "rank": 0}]},
        {"blocks": [{**BLOCK, "rank": 10**400}]},
        {"blocks": [{**BLOCK, "rank": "9"}]},
        {"blocks": 3},
        {"mean": None},
        {"calibration": {"data": None}},
    ],
)
def test_a_file_of_ranks_that_no_run_writes_is_refused(changed, tmp_path):
    (tmp_path / "ranks.json").write_text(json.dumps({**GOOD, **changed}))
    with pytest.raises(InputError, match=r"ranks.json"):
        ranks_file.read_ranks(tmp_path)


@pytest.mark.thorough
def test_names_of_blocks_cannot_add_to_a_page(tmp_path, run):
    folder = shutil.copytree(run.path, tmp_path / "run")
    evil = {**BLOCK, "path": "<script>alert(1)</script>.0", "rank": None}
    (folder / "ranks.json").write_text(json.dumps({**GOOD, "blocks": [BLOCK, evil]}))
    page = write_page(folder).read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
