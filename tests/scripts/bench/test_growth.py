"""Section `growth`: rows and runs of several numbers are measured, and how costs grow."""

import pytest
from bench import growth


def test_costs_that_double_with_their_work_have_the_exponent_one():
    costs = [{"read s": 5.0}, {"read s": 2.0}, {"read s": 4.0}, {"read s": 8.0}]
    *each, slope = growth.records("rows", (10, 100, 200, 400), costs)
    assert [record.row for record in each] == ["10 rows", "100 rows", "200 rows", "400 rows"]
    assert slope.facts["read s"] == pytest.approx(1.0)
    # a clock that saw nothing
    assert growth.records("rows", (1, 2, 4), [{"read s": 0.0}] * 3)[-1].facts["read s"] == 0


@pytest.mark.thorough
def test_rows_and_runs_are_measured():
    rows = growth.measure((40, 50, 60), (2, 3, 4))
    assert [record.shape for record in rows] == ["rows"] * 4 + ["runs compared"] * 4
    assert all(record.facts["read s"] >= 0 for record in rows[:3])
    assert all(record.facts["own MB"] > 0 for record in rows[4:7])
    assert all(record.facts["compare s"] > 0 for record in rows[4:7])
