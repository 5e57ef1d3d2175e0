"""Bytes and seconds as a user reads them."""

import pytest

from petl.reports.formatting import duration, size


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
def test_a_duration_is_never_nothing_and_has_the_units_of_its_length(seconds, words):
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
def test_a_size_has_the_unit_of_its_amount(count, words):
    assert size(count) == words
