"""Sizes, durations, scores and numbers as text."""

import pytest

from petl.experiments.reports.formatting import (
    count_text,
    duration,
    mean_text,
    number,
    size,
)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "under 0.1 s"),
        (0.04, "under 0.1 s"),
        (0.31, "0.3 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (140.2, "2 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7_500, "2 h 5 min"),
        (180_000, "50 h 0 min"),
    ],
)
def test_a_duration_is_never_zero_and_has_units_that_fit(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 kB"),
        (4_300, "4 kB"),
        (345_000, "345 kB"),
        (1_000_000, "1.00 MB"),
        (9_768_960, "9.77 MB"),
        (2_345_000_000, "2.35 GB"),
    ],
)
def test_a_size_has_a_unit_that_fits(count, words):
    assert size(count) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0002, "0.0002"), (1e-6, "1e-06"), (1234567, "1,234,567"), (2.5, "2.5")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_mean_has_a_spread_from_two_values_on():
    assert mean_text("accuracy", [0.5]) == "50.0 %"
    assert mean_text("accuracy", [0.5, 0.5]) == "50.0 ± 0.0 %"
    assert mean_text("loss", [1.0, 2.0, 3.0]) == "2.000 ± 1.000"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 steps"), (1, "1 step"), (1.0, "1 step"), (0.5, "0.5 steps"), (1_200, "1,200 steps")],
)
def test_a_count_has_the_singular_of_one_only(number, text):
    assert count_text(number, "step") == text
