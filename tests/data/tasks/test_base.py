"""Evaluations are ranked by metric, then loss."""

import math

from petl.data.tasks.base import not_finite, quality


def best(evaluations, metric="accuracy", *, higher_is_better=True):
    """The index of the best evaluation, as all callers choose it."""
    key = lambda i: quality(evaluations[i], metric, higher_is_better=higher_is_better)  # noqa: E731
    return max(range(len(evaluations)), key=key)


def test_of_equal_scores_the_lower_loss_is_better_and_of_equal_losses_the_earlier():
    evaluations = [
        {"accuracy": 0.5, "loss": 0.1},
        {"accuracy": 0.9, "loss": 0.4},
        {"accuracy": 0.9, "loss": 0.3},
        {"accuracy": 0.9, "loss": 0.3},
    ]
    assert best(evaluations) == 2
    assert best([{"pearson": 0.9, "mse": 2.0}, {"pearson": 0.9, "mse": 1.0}], "pearson") == 1
    assert best([{"accuracy": 0.9}, {"accuracy": 0.9}]) == 0


def test_a_metric_may_be_better_when_it_is_lower():
    evaluations = [{"loss": 2.0}, {"loss": 1.0}, {"loss": 3.0}]
    assert best(evaluations, "loss", higher_is_better=False) == 1


def test_a_score_that_is_not_finite_is_the_worst():
    for broken in (math.nan, math.inf):
        assert best([{"accuracy": broken, "loss": 1.0}, {"accuracy": 0.1, "loss": 9.0}]) == 1
        assert best([{"accuracy": 0.1, "loss": broken}, {"accuracy": 0.1, "loss": 9.0}]) == 1
    assert best([{"loss": math.nan}, {"loss": 9.0}], "loss", higher_is_better=False) == 1


def test_the_first_score_that_is_not_finite_is_named():
    assert not_finite({"accuracy": 0.5, "loss": math.nan, "rows": 3.0}) == "loss"
    assert not_finite({"loss": 800.0, "perplexity": math.inf}) is None  # e^800 overflows
