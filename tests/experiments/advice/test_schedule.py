"""A schedule stays within its cost, whatever runs turn out to need."""

from dataclasses import replace
from itertools import pairwise

import pytest

from petl.experiments.advice.schedule import Budget, Seconds, first_steps, last_round


def spend(cost: float, full: int, planned: Seconds, true: Seconds, candidates: int = 8):
    """Seconds that a schedule spends if runs need `true`, and its rungs."""
    unit = true.begin + true.of(1, full)
    budget, steps = Budget(cost, unit, full), first_steps(full)
    spent = true.begin + true.of(1, steps)
    count = budget.first(spent, planned, candidates)
    spent += (count - 1) * (true.run + true.step * steps * true.joint)
    known = replace(planned, joint=true.joint) if count > 2 else planned
    rungs, before = [], steps
    for number in range(1, budget.rungs):
        rung = budget.following(number, spent, known, count, before)
        if rung is None:
            break
        rungs.append(rung)
        before, count = rung.steps, rung.settings
        spent += true.of(rung.runs, rung.steps)
    last = last_round(cost)
    return (spent + true.of(last.runs, full)) / unit, rungs


@pytest.mark.every_cell
@pytest.mark.parametrize("cost", [1, 2, 2.5, 3, 4, 6])
@pytest.mark.parametrize("full", [60, 400, 5000])
@pytest.mark.parametrize("step", [0.02, 0.4, 3.0])
def test_a_schedule_stays_within_its_cost(cost, full, step):
    runs = Seconds(8.0, 4.0, step)
    spent, rungs = spend(cost, full, runs, runs)
    # nothing is left to spend of a plain run that is hardly longer than its start and the first
    # trial, and --cost 1; the last round is made in any case
    if cost > 1 or full * step > 100:
        assert spent <= cost
    for before, after in pairwise(rungs):
        assert after.steps > before.steps
        assert after.settings <= before.settings


@pytest.mark.parametrize("full", [6, 25])
def test_where_no_longer_trial_can_follow_the_first_ones_have_all_that_is_left(full):
    runs = Seconds(5.0, 2.0, 0.2)
    budget, first = Budget(4, 5 + runs.of(1, full), full), first_steps(full)
    spent = runs.begin + runs.of(1, first)
    assert budget.following(1, spent, runs, 9, first) is None
    count = budget.first(spent, runs, 9)
    left = budget.left(spent, runs) - runs.of(2, first) / 2 * (count - 1)
    assert 0 <= left < runs.of(2, first) / 2
    assert spend(4, full, runs, runs)[0] <= 4


@pytest.mark.parametrize("joint", [0.5, 1.2])
def test_passes_of_several_may_be_faster_or_slower_than_assumed(joint):
    runs = Seconds(8.0, 4.0, 0.4)
    spent, rungs = spend(2, 1000, runs, replace(runs, joint=joint))
    assert spent <= 2
    assert rungs[-1].runs >= 3


def test_the_last_round_grows_with_the_cost():
    assert [last_round(cost).runs for cost in (1, 1.9, 2, 2.9, 3, 4, 9)] == [0, 0, 1, 1, 2, 4, 4]


def test_more_cost_buys_longer_trials():
    runs = Seconds(8.0, 4.0, 0.4)
    longest = [spend(cost, 2000, runs, runs)[1][-1].steps for cost in (2, 2.5, 2.9)]
    assert longest == sorted(set(longest))


def test_what_a_pass_of_several_costs_is_measured():
    runs = Seconds(8.0, 4.0, 0.5)
    assert runs.measured(4, 100, 4 * 4.0 + 4 * 100 * 0.5 * 0.6).joint == pytest.approx(0.6)
    assert runs.measured(1, 100, 54.0) == runs
    # the first trial is no shorter than what says something, and no longer than a run
    assert [first_steps(full) for full in (5, 100, 2000)] == [5, 20, 100]
