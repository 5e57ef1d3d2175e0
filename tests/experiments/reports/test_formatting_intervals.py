"""Wilson's interval has the published limits; the sign test is exact."""

import pytest
from scipy.stats import binomtest

from petl.experiments.reports.formatting import interval, sign_test, wilson

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


@pytest.mark.parametrize(("one", "other"), [(1, 0), (5, 0), (3, 3), (2, 9), (40, 25)])
def test_the_sign_test_is_that_of_scipy(one, other):
    expected = binomtest(one, one + other).pvalue
    assert sign_test(one, other) == sign_test(other, one) == pytest.approx(expected)


@pytest.mark.thorough
def test_the_sign_test_of_many_examples_is_exact_and_quick():
    assert sign_test(0, 0) == sign_test(50_000, 50_000) == 1.0
    assert 0 < sign_test(50_600, 49_400) < 0.001
