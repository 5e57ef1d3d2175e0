"""Claims about other numbers than the accuracy, and about edited adapters."""

import math
from dataclasses import replace

import numpy as np
import pytest
from claims import edits, page, routers, running
from claims.claim import Statement
from claims.intervals import estimate
from claims.measures import ACCURACY, LOSS, SECONDS
from claims.pictures import margins
from claims.verdicts import FAILS, HOLDS, OPEN, needed_half_width, verdict

from petl.errors import InputError

pytest_plugins = ["training_fixtures", "claims_fixtures"]


# Ratios


def test_a_measure_of_whole_runs_has_the_paired_interval_of_its_logarithms():
    one, two = [40.0, 44.0, 42.0, 41.0], [80.0, 90.0, 79.0, 85.0]
    found = estimate({s: np.log([a / b]) for s, (a, b) in enumerate(zip(one, two, strict=True))})
    logs = [math.log(a / b) for a, b in zip(one, two, strict=True)]
    mean = sum(logs) / 4
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / 3)
    half = 3.182 * deviation / 2  # Student's t of 3 degrees at 97.5 %, over the root of 4
    assert found.interval() == pytest.approx((mean - half, mean + half), abs=1e-4)
    words = SECONDS.text(found)
    expected = (math.exp(x) for x in (mean, mean - half, mean + half))
    assert words == "{:.3g} times ({:.3g} to {:.3g})".format(*expected)


@pytest.mark.parametrize(("share", "word"), [(0.55, HOLDS), (0.45, FAILS), (0.5, OPEN)])
def test_a_share_holds_where_the_whole_interval_is_below_it(share, word):
    statement = Statement("half", "share", "a", "b", margin=share, measure=SECONDS)
    times = {s: np.array([v]) for s, v in enumerate((0.49, 0.5, 0.51))}
    found = running.difference(statement, {"a": times, "b": {s: np.array([1.0]) for s in times}})
    assert verdict(statement, found).word == word


def test_more_seeds_are_what_it_takes_where_whole_runs_are_measured():
    found = estimate({s: np.log([v]) for s, v in enumerate((0.4, 0.46, 0.5))})
    statement = Statement("", "share", "a", "b", margin=0.5, measure=SECONDS)
    assert verdict(statement, found).word == OPEN
    assert needed_half_width("share", math.log(0.4), math.log(0.5)) == pytest.approx(math.log(1.25))
    takes = verdict(statement, found).takes
    assert takes.startswith("about ")
    assert "rows" not in takes


def test_a_kind_that_does_not_fit_the_measure_is_refused():
    for kind, measure in (("beats", {"measure": SECONDS}), ("share", {})):
        with pytest.raises(ValueError, match=f"'{kind}'"):
            Statement("", kind, "a", "b", **measure)


def test_of_losses_the_lower_is_better():
    statement = Statement("", "beats", "a", "b", margin=0.01, measure=LOSS)
    rng = np.random.default_rng(0)
    of_row = rng.normal(3, 1, 200)
    values = {
        "a": {s: of_row + rng.normal(0, 0.01, 200) for s in range(3)},
        "b": {s: of_row + 0.1 + rng.normal(0, 0.01, 200) for s in range(3)},
    }
    found = running.difference(statement, values)
    assert verdict(statement, found).word == HOLDS
    assert LOSS.text(found).startswith("-0.10")  # the loss of the first, less that of the second
    assert LOSS.text(found).endswith("nats")
    assert page.rule(statement) == "test loss: below 0 (matters: 0.01)"
    same = replace(statement, kind="no_worse")
    assert page.rule(same) == "test loss: below +0.01"
    assert page.rule(replace(same, measure=ACCURACY)) == "above -1"
    assert margins(same) == (-0.01, 0)


# Edited adapters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("shrink by=2", "'shrink by=2' is not an edit; known, with their settings: compress"),
        ("prune drop=0.5", "is not an edit"),
        ("prune drop=0.5 q=best", "q=best is not one of dare, closed"),
    ],
)
def test_words_that_are_no_edit_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        edits.parsed(words)


# Losses, also on other files


# Routers


def test_mutual_information_does_not_depend_on_the_numbers_of_the_experts():
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 400)
    b = np.where(rng.random(400) < 0.5, a, rng.integers(0, 3, 400))
    expected = normalized_mutual_info_score(a, b)
    assert routers.mutual_information(a, b) == pytest.approx(expected)
    renamed = np.array([3, 1, 4, 0, 2])
    assert routers.mutual_information(renamed[a], b) == pytest.approx(expected)
    assert routers.mutual_information(a, renamed[a]) == pytest.approx(1)
    assert routers.mutual_information(a, np.zeros(400, int)) == pytest.approx(0, abs=1e-12)
