"""Evaluations are ranked by metric, then loss; the limits of Wilson's interval."""

import math

import pytest
from scipy.stats import binomtest

from petl.ops.scores import interval, not_finite, quality, sign_test, wilson

# Newcombe 1998, Statistics in Medicine 17, table I, method 3: right answers, examples, limits
NEWCOMBE = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("right", "count", "low", "high"), NEWCOMBE)
def test_wilsons_interval_has_the_published_limits(right, count, low, high):
    assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (7, 7), (3, 10), (950, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilsons_interval_is_that_of_scipy(right, count, level):
    expected = binomtest(right, count).proportion_ci(level, method="wilson")
    assert wilson(right / count, count, level) == pytest.approx(tuple(expected), abs=1e-12)


def test_after_all_right_answers_the_interval_has_a_width():
    low, high = wilson(1.0, 50)
    assert 0.92 < low < 0.94
    assert high == 1.0


def test_only_proportions_of_examples_have_an_interval():
    assert interval("accuracy", 0.5, {"rows": 10.0}) == wilson(0.5, 10)
    for metric, scores in (
        ("f1", {"rows": 10.0}),
        ("loss", {"tokens": 10.0}),
        ("accuracy", {"words": 10.0}),  # the words of a text are not independent
        ("accuracy", {}),
    ):
        assert interval(metric, 0.5, scores) is None


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


@pytest.mark.parametrize(("one", "other"), [(1, 0), (5, 0), (3, 3), (2, 9), (40, 25)])
def test_the_sign_test_is_that_of_scipy(one, other):
    expected = binomtest(one, one + other).pvalue
    assert sign_test(one, other) == sign_test(other, one) == pytest.approx(expected)


def test_the_sign_test_of_many_examples_is_exact_and_quick():
    assert sign_test(0, 0) == sign_test(50_000, 50_000) == 1.0
    assert 0 < sign_test(50_600, 49_400) < 0.001
