"""CFSP's two formulas, against the steps of the authors' code (wyxscir/CFSP) as plain loops."""

import math

import pytest
import torch

from petl.training.ranks import channel_scores, keep_ratios

BLOCKS = [0.0606, 0.3927, 0.2609, 0.5161]  # means over tokens


def authors_ratios(sums, ratio, a):
    """The steps of `prune_cfsp` on the sums over 128 x 1,024 tokens."""
    middle = sum(sums) / len(sums)
    z = [1 / (1 + math.exp(-(S - middle) / 1e4 * a)) for S in sums]
    average, largest = sum(z) / len(z), max(z)
    if largest / average * (1 - ratio) >= 1:
        factor = average * (1 / (1 - ratio) - 1) / (largest - average) / 1.05
        z = [average + (value - average) * factor for value in z]
        average = sum(z) / len(z)
    return [value / average * (1 - ratio) for value in z]


@pytest.mark.parametrize(
    ("sparsity", "a"), [(0.2, 1), (0.5, 1), (0.2, 0), (0.05, 3), (0.7, 0.5), (0.9, 10)]
)
def test_ratios_are_those_of_the_code_at_its_calibration_size(sparsity, a):
    importance = {str(i): S for i, S in enumerate(BLOCKS)}
    found = keep_ratios(importance, sparsity, a=a)
    expected = authors_ratios([128 * 1024 * S for S in BLOCKS], sparsity, a)
    assert list(found.values()) == pytest.approx(expected, rel=1e-12)
    assert sum(found.values()) / 4 == pytest.approx(1 - sparsity)
    assert max(found.values()) < 1


def test_without_sparsity_everything_stays():
    ratios = keep_ratios({"a": 0.1, "b": 0.4}, 0.0)
    assert list(ratios.values()) == pytest.approx([1, 1])


def test_importances_far_apart_have_ratios():
    # mean squares of states with a few large values
    ratios = keep_ratios({"a": 0.1, "b": 200.0}, 0.5)
    assert ratios["b"] == pytest.approx(0.5 * (1 + 1 / 1.05))
    assert sum(ratios.values()) == pytest.approx(1)


@pytest.mark.parametrize(("gated", "b", "c"), [(True, 1.0, 1.0), (False, 0.5, 2.0)])
def test_channel_scores_are_a_loop_over_channels(gated, b, c):
    D, F = 3, 5
    down, up, gate = torch.randn(D, F), torch.randn(F, D), torch.randn(F, D)
    norms = torch.rand(F) + 0.1
    found = channel_scores(down, norms, up if gated else None, gate if gated else None, b=b, c=c)
    for j in range(F):
        n = float(norms[j])
        columns = [[abs(float(down[i, j])) * n**b for i in range(D)]]
        columns += [[abs(float(w[j, i])) for i in range(D)] for w in (up, gate)] if gated else []
        rows = [sum(column[i] / sum(column) for column in columns) * n**c for i in range(D)]
        assert float(found[j]) == pytest.approx(sum(rows) / D, rel=1e-5)
    # each column adds up to 1, so the code keeps the channels of the largest norms
    assert found.argsort().tolist() == norms.argsort().tolist()


def test_a_channel_of_zeros_has_a_score():
    down = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert channel_scores(down, torch.tensor([1.0, 1.0])).tolist() == [0.5, 0.0]
