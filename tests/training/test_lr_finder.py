"""The range test for the learning rate."""

import json
import math
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from training_fixtures import launch, train

import petl
from petl.errors import InputError
from petl.testing import tiny_llama
from petl.training import lr_finder
from petl.training.lr_finder import (
    HIGH,
    LOW,
    MARGIN,
    RangeTest,
    conclude,
    limits_of,
    lr_at,
    reach_of,
    smooth,
    with_shared_base,
)
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]

SEARCH = ["train.find_lr=true", "train.find_lr_steps=12"]


def test_rates_rise_by_the_same_factor_from_low_to_high():
    rates = [lr_at(step, 7) for step in range(1, 8)]
    assert rates[0] == LOW
    assert rates[-1] == pytest.approx(HIGH)
    factors = {round(b / a, 9) for a, b in pairwise(rates)}
    assert factors == {10.0}


def test_smoothing_is_a_mean_whose_weights_fall_with_the_distance():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    found = smooth(values, reach=1)
    assert found[0] == pytest.approx((2 * 3 + 1) / 3)
    assert found[3] == pytest.approx((4 + 2 * 1 + 5) / 4)
    assert found[-1] == pytest.approx((9 + 2 * 2) / 3)
    assert smooth([0.5] * 20, reach=4) == pytest.approx([0.5] * 20)


def test_the_rate_is_a_share_of_that_of_the_lowest_smoothed_loss():
    rates = [lr_at(step, 61) for step in range(1, 62)]  # ten to a decade
    losses = [abs(math.log10(rate) + 2) for rate in rates]  # lowest at 0.01
    losses[3] = 0.0  # one lucky batch
    assert RangeTest(rates, losses).suggestion() == pytest.approx(0.01 / MARGIN)


def test_a_test_of_few_steps_is_not_smoothed_over_half_of_its_rates():
    rates = [lr_at(step, 12) for step in range(1, 13)]
    losses = [2.7] * 6 + [2.6, 2.5, 2.4, 3.5, 5.3, 30.0]  # lora on the quickstart; lowest at 0.02
    found = RangeTest(rates, losses, reach_of(12)).suggestion()
    assert found is not None
    assert 0.005 <= found * MARGIN <= 0.05
    assert reach_of(100) == 4


def test_where_no_rate_lowers_the_loss_the_given_one_stays(tmp_path, petl_log):
    test = RangeTest([1e-6, 1e-5, 1e-4], [1.0, 2.0, 4.0])
    assert test.suggestion() is None
    note = conclude(test, TrainConfig(lr=0.007), tmp_path)
    assert note["lr"] == 0.007
    assert "no learning rate of the range test lowered the loss" in petl_log.text


def test_the_picture_shows_the_valley_however_far_the_loss_diverges():
    losses = [2.7, 2.68, 2.6, 2.5, 2.52, 30.0, math.inf]
    smoothed = [2.7, 2.69, 2.6, 2.52, 2.55, 12.0, math.inf]
    low, high = limits_of(losses, smoothed)
    assert low < 2.5
    assert 2.7 < high < 3  # as far above the start as the valley is below it
    assert limits_of([1.0, 1.0], [1.0, 1.0])[0] < 1.0 < limits_of([1.0, 1.0], [1.0, 1.0])[1]


def test_a_copy_shares_what_is_frozen_and_nothing_that_trains():
    model = petl.wrap(tiny_llama(), "mola", target_modules="query-value")
    twin = with_shared_base(model)
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    for (name, mine), (other, theirs) in pairs:
        assert name == other
        assert (mine is theirs) == (not mine.requires_grad)


def assert_search_leaves_no_trace(tiny, folder, *words):
    """A run that finds its learning rate equals, bit by bit, one that was given it."""
    common = [*tiny.classify, *words, "train.log_steps=1"]
    found = train([*common, *SEARCH, "train.lr=0.001"], folder / "found")
    scores = found.scores
    lr, head_lr = scores["lr"], scores["head_lr"]
    assert lr == scores["find_lr"]["lr"] != 1e-3
    rates = [f"train.lr={lr!r}"]
    if head_lr is not None:  # dkvb takes the place of the head
        assert head_lr == pytest.approx(10 * lr)
        rates.append(f"train.head_lr={head_lr!r}")
    given = train([*common, *rates], folder / "given")
    assert found.adapter.keys() == given.adapter.keys()
    for name, tensor in found.adapter.items():
        assert torch.equal(tensor, given.adapter[name]), name
    timeless = [
        [{key: value for key, value in line.items() if key != "seconds"} for line in run.metrics]
        for run in (found, given)
    ]
    assert timeless[0] == timeless[1]
    return found


METHODS = {
    "increlora": ["method.target_r=2"],
    "adalora": ["method.tinit=1", "method.tfinal=1"],
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_restored_exactly(tiny, tmp_path, name):
    found = assert_search_leaves_no_trace(tiny, tmp_path, f"+method={name}", *METHODS[name])
    points = json.loads((found.path / "lr_range.json").read_text())
    assert len(points["rates"]) == len(points["losses"]) == found.scores["find_lr"]["steps"]
    assert (found.path / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    assert found.scores["time_split"]["range test"] > 0


def test_a_resumed_run_takes_the_learning_rate_from_its_scores(petl_log):
    run = SimpleNamespace(scores={"find_lr": {"lr": 0.02, "rule": "a rule"}})
    settings = TrainConfig(lr=0.001, head_lr=0.005, find_lr=True)
    context = SimpleNamespace(run=run, settings=settings)
    lr_finder.LrFinder(True, {}).before_training(context)
    assert (context.settings.lr, context.settings.head_lr) == (0.02, pytest.approx(0.1))
    assert "learning rate 0.02: a rule" in petl_log.text


@pytest.mark.thorough
def test_a_run_class_by_class_is_tested_on_all_of_them(tiny, tmp_path, monkeypatch):
    seen, load = set(), lr_finder.load_on_cpu

    def recorded(*args):
        for batch in load(*args):
            seen.update(batch["labels"].tolist())
            yield batch

    monkeypatch.setattr(lr_finder, "load_on_cpu", recorded)
    words = ["data.order=by_class", "train.steps=null", "train.batch_size=4"]
    words += ["train.find_lr=true", "train.find_lr_steps=10"]
    train([*tiny.classify, "+method=lora", *words], tmp_path)
    assert seen == {0, 1, 2}


@pytest.mark.thorough
def test_a_resumed_run_whose_scores_were_deleted_finds_the_same_rate(tiny, tmp_path):
    words = [*tiny.steady, "+method=lora", *SEARCH, "train.steps=4", "train.save_steps=2"]
    run = train(words, tmp_path / "run")
    rate = run.scores["find_lr"]
    shutil.rmtree(run.path / "checkpoints" / "step-000004")
    (run.path / "scores.json").unlink()
    resume = [*words, f"train.resume={run.path}"]
    assert train(resume, run.path).scores["find_lr"] == rate
    shutil.rmtree(run.path / "checkpoints" / "step-000004")
    (run.path / "scores.json").unlink()
    (run.path / "lr_range.json").unlink()
    with pytest.raises(InputError):
        train(resume, run.path)


@pytest.mark.slow
def test_two_processes_find_the_rate_of_one(tiny, tmp_path):
    words = [*tiny.steady, "+method=mola", *SEARCH, "train.find_lr_steps=30"]
    one = train(words, tmp_path / "one")
    ran = launch([*words, f"train.run={tmp_path}/two"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    there = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    assert there["lr"] == one.scores["lr"]
