"""The choice of a learning rate in studies of scripts, and the runs that they keep."""

import math

import pytest
import torch
from rate_study import RateStudy, Scores, fit
from torch import nn

from petl.errors import InputError

LOSSES = {("a", 0.1): 3.0, ("a", 0.2): 2.0, ("b", 0.1): 4.0, ("b", 0.2): math.nan}


def study_with(folder, seeds=(5, 6), settings=None):
    """Run a study with known losses; return the runs that were trained."""
    trained = []

    def train(name, rate, seed):
        trained.append((name, rate, seed))
        loss = LOSSES[name, rate]
        # the test loss orders the rates of `a` the other way round
        return Scores(loss, 10 - loss + seed, 1234, 0.25, {"errors": 0.5})

    RateStudy(folder, ["a", "b"], [0.1, 0.2], seeds).run(train, settings or {"steps": 3})
    return trained


def test_other_seeds_train_with_the_rate_of_the_lowest_validation_loss(tmp_path, capsys):
    trained = study_with(tmp_path / "new")
    first = [(name, rate, 5) for name in "ab" for rate in (0.1, 0.2)]
    assert trained == [*first, ("a", 0.2, 6), ("b", 0.1, 6)]
    printed = capsys.readouterr().out
    assert (
        "| a | 13.5000 ± 0.7071 | 13.0000, 14.0000 | 0.5000 ± 0.0000 | 0.2 | 1,234 | 0.250 |"
    ) in printed
    assert "| a | 3.0000 | 2.0000 * |" in printed
    assert "| b | 4.0000 * | nan |" in printed


def test_a_diverged_rate_is_not_chosen_though_it_is_tried_first(tmp_path, capsys):
    losses = {0.2: math.nan, 0.1: 1.0}

    def train(name, rate, seed):
        return Scores(losses[rate], losses[rate], 1, 0.25)

    RateStudy(tmp_path, ["a"], [0.2, 0.1], [0, 1]).run(train, {})
    assert "| a | 1.0000 ± 0.0000 |" in capsys.readouterr().out
    RateStudy(tmp_path / "none", ["a"], [0.2], [0, 1]).run(train, {})
    assert "| a | nan | nan, nan |" in capsys.readouterr().out


def test_kept_runs_are_not_trained_again(tmp_path, capsys):
    study_with(tmp_path, seeds=[5])
    tables = capsys.readouterr().out.partition("| method")[2]
    assert study_with(tmp_path, seeds=[5]) == []
    assert capsys.readouterr().out.partition("| method")[2] == tables
    assert study_with(tmp_path, seeds=[5, 6]) == [("a", 0.2, 6), ("b", 0.1, 6)]


def test_runs_with_other_settings_are_refused(tmp_path):
    study_with(tmp_path)
    with pytest.raises(InputError, match=r"settings \{'steps': 3\}, not \{'steps': 4\}"):
        study_with(tmp_path, settings={"steps": 4})


def test_fit_trains_what_asks_for_gradients_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    frozen, x = model[0].weight.clone(), torch.randn(16, 3)
    target, losses = x.sum(1, keepdim=True), []

    def loss():
        losses.append((model(x) - target).square().mean())
        return losses[-1]

    seconds = fit(model, [loss] * 50, 50, 0.05)
    assert seconds > 0
    assert torch.equal(model[0].weight, frozen)
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
