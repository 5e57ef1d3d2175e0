"""The evolutionary search on functions whose best state is known."""

import itertools
import json
import math
from random import Random

import pytest

import petl
from petl.adapters import search
from petl.adapters.search.evolve import Space, trades
from petl.testing import in_processes

ONE_STAGE = ((1, 10),)


def convex(state, tokens):
    """The sum of a convex function of each level; the weights differ by unit."""
    return sum((unit + 1) * (level - 3.2) ** 2 for unit, level in enumerate(state))


def best_of_convex(units, levels, total):
    """The optimum under a fixed sum, level by level: steps of least cost first."""
    state = [0] * units
    for _ in range(total):
        raised = [
            [level + (i == unit) for i, level in enumerate(state)]
            for unit in range(units)
            if state[unit] + 1 < levels
        ]
        state = min(raised, key=lambda each: convex(each, 0))
    return tuple(state)


def test_a_separable_optimum_is_reached_and_the_sum_never_changes():
    seen = set()

    def fitness(state, tokens):
        seen.add(state)
        return convex(state, tokens)

    found = search.evolve([6] * 12, 20, fitness, generations=200, stages=ONE_STAGE)
    assert found.start == (2,) * 8 + (1,) * 4
    assert found.state == best_of_convex(12, 6, 20)
    assert {sum(state) for state in seen} == {20}


def test_units_that_help_only_together_are_found_where_single_scores_mislead():
    # level 1 helps a little everywhere, but only units 0 and 1 together remove most of the loss
    gains = (0.0, 0.0, 0.3, 0.3, 0.2, 0.2)

    def loss(state, tokens=0):
        return 2.0 - sum(g * s for g, s in zip(gains, state, strict=True)) - 2 * state[0] * state[1]

    alone = [loss(tuple(int(i == unit) for i in range(6))) for unit in range(6)]
    greedy = sorted(range(6), key=alone.__getitem__)[:2]
    greedy_state = tuple(int(unit in greedy) for unit in range(6))
    every = [state for state in itertools.product((0, 1), repeat=6) if sum(state) == 2]
    best = min(every, key=loss)
    found = search.evolve([2] * 6, 2, loss, generations=20, stages=ONE_STAGE, state=greedy_state)
    assert loss(greedy_state) > loss(best)
    assert found.state == best


def test_the_number_of_trades_follows_its_law():
    rng, draws = Random(0), 9000
    counts = [0] * 4
    for _ in range(draws):
        counts[trades(rng)] += 1
    assert counts[0] == 0
    for count, law in zip(counts[1:], (5 / 9, 3 / 9, 1 / 9), strict=True):
        assert abs(count - law * draws) < 3 * math.sqrt(draws * law * (1 - law))


def test_evaluations_and_tokens_are_those_of_the_stages():
    calls = []

    def fitness(state, tokens):
        calls.append(tokens)
        return convex(state, tokens)

    found = search.evolve([6] * 12, 20, fitness, generations=3)
    assert [calls.count(tokens) for tokens in (512, 4096, 16384)] == [96, 24, 9]
    assert [each.evaluations for each in found.history] == [43] * 3
    assert [each.generation for each in found.history] == [1, 2, 3]
    assert len(calls) == 129


def test_fitness_never_rises_although_few_tokens_are_noisy():
    def fitness(state, tokens):
        noise = Random(f"{state}, {tokens}").gauss(0, 30) if tokens < 100 else 0.0
        return convex(state, tokens) + noise

    found = search.evolve(
        [6] * 12, 20, fitness, generations=40, stages=((4, 10), (1, 100)), offspring=16
    )
    values = [each.fitness for each in found.history]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    assert found.fitness == values[-1] == convex(found.state, 100)


COSTS = [[0, 1, 2.5, 7], [3, 4, 9], [0, 10, 20, 30, 40], [1, 1, 2]]
LEVELS = [len(own) for own in COSTS]


def cost(state):
    return sum(own[level] for own, level in zip(COSTS, state, strict=True))


def is_full(state, budget):
    """True if a state is within the budget, and no unit can be raised by one more level."""
    steps = [
        own[level + 1] - own[level]
        for own, level in zip(COSTS, state, strict=True)
        if level + 1 < len(own)
    ]
    return cost(state) <= budget and all(cost(state) + step > budget for step in steps)


@pytest.mark.parametrize("budget", [4, 13.5, 31, 100])
def test_no_candidate_costs_more_than_the_budget_and_little_is_left(budget):
    seen = set()

    def fitness(state, tokens):
        seen.add(state)
        return float(sum((level - 2) ** 2 for level in state))

    settings = {"generations": 10, "stages": ONE_STAGE, "offspring": 8}
    found = search.evolve(LEVELS, budget, fitness, costs=COSTS, **settings)
    assert all(cost(state) <= budget for state in seen)
    assert all(is_full(state, budget) for state in seen)
    full = [s for s in itertools.product(*map(range, LEVELS)) if is_full(s, budget)]
    assert fitness(found.state, 0) == min(fitness(state, 0) for state in full)


def test_the_even_start_raises_unit_after_unit():
    assert search.even([3, 3, 3, 3], 5) == (2, 1, 1, 1)
    assert search.even([2, 5, 2], 6) == (1, 4, 1)
    assert search.even(LEVELS, 15, COSTS) == (2, 2, 0, 2)


def test_no_state_is_further_from_the_start_than_allowed():
    seen = []

    def fitness(state, tokens):
        seen.append(state)
        return convex(state, tokens)

    settings = {"stages": ONE_STAGE, "max_deviation": 2}
    first = search.evolve([6] * 12, 20, fitness, generations=5, **settings)
    search.evolve([6] * 12, 20, fitness, generations=5, state=first, **settings)
    start = first.start
    far = [sum(abs(a - b) for a, b in zip(s, start, strict=True)) for s in seen]
    assert max(far) == 2


@pytest.mark.parametrize(("levels", "budget"), [([1, 1], 0), ([3, 3], 4), ([2, 2], 1)])
def test_a_small_space_ends_with_the_candidates_there_are(levels, budget):
    found = search.evolve(levels, budget, convex, generations=2, stages=ONE_STAGE, offspring=8)
    possible = [s for s in itertools.product(*map(range, levels)) if sum(s) == sum(found.start)]
    assert [each.evaluations for each in found.history] == [len(possible)] * 2


def test_candidates_of_a_generation_differ_from_each_other_and_from_the_parent():
    space = Space((6,) * 12, 20, None, None)
    parent = space.even()
    drawn = space.offspring(parent, parent, 32, Random(0))
    assert len({parent, *drawn}) == 33


def test_ties_go_to_the_parent_and_then_to_the_smaller_state():
    found = search.evolve([3] * 4, 4, lambda state, tokens: 1.0, generations=3, stages=ONE_STAGE)
    assert found.state == found.start

    def all_but_the_start(state, tokens):
        return float(state == found.start)

    better = search.evolve([3] * 4, 4, all_but_the_start, generations=1, stages=ONE_STAGE, seed=1)
    drawn = Space((3,) * 4, 4, None, None).offspring(found.start, found.start, 32, Random("1, 1"))
    assert better.state == min(drawn)


def test_a_resumed_search_equals_an_unbroken_one(tmp_path):
    settings = {"stages": ((3, 10), (1, 100)), "offspring": 8, "seed": 7}
    unbroken = search.evolve([6] * 12, 20, convex, generations=9, **settings)
    first = search.evolve([6] * 12, 20, convex, generations=4, **settings)
    first.save(tmp_path / "search.json")
    again = search.Evolution.load(tmp_path / "search.json")
    assert again == first
    resumed = search.evolve([6] * 12, 20, convex, generations=5, state=again, **settings)

    def course(found):
        return [(g.generation, g.state, g.fitness, g.evaluations) for g in found.history]

    assert course(resumed) == course(unbroken)
    assert resumed.start == unbroken.start
    other = search.evolve([6] * 12, 20, convex, generations=9, **{**settings, "seed": 8})
    assert course(other) != course(unbroken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": [2, 2]}, "levels do not fit 2 units"),
        ({"state": [9] * 12}, "level 9 of unit 0 is not in 0..5"),
        ({"state": [0] * 12}, "another state"),
        ({"history": [1]}, "history"),
        ({"history": [{"generation": 2, "state": [0] * 12, "fitness": 1.0}]}, "no evaluations"),
        ({"seed": "x"}, "seed"),
        ({"start": None}, "start"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, changes, message):
    file = tmp_path / "search.json"
    search.evolve([6] * 12, 20, convex, generations=1, stages=ONE_STAGE).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(petl.InputError, match=message):
        search.Evolution.load(file)


def _searched():
    """The course of a search, and how often this process computed the fitness."""
    calls = []

    def fitness(state, tokens):
        calls.append(tokens)
        return convex(state, tokens)

    found = search.evolve(
        [6] * 12, 20, fitness, generations=3, stages=((4, 1), (1, 9)), offspring=8
    )
    return [(each.state, each.fitness, each.evaluations) for each in found.history], len(calls)


@pytest.mark.thorough
def test_processes_share_the_candidates_and_find_the_same():
    alone, calls = _searched()
    assert calls == 3 * (8 + 5)
    # of 8 candidates 4 each; of 5, three and two
    assert in_processes(2, _searched) == [(alone, 3 * 7), (alone, 3 * 6)]


def test_a_search_is_not_resumed_with_another_seed_or_budget():
    first = search.evolve([3, 3], 2, convex, generations=1, stages=ONE_STAGE)
    for changes in ({"seed": 1}, {"budget": 3}):
        given = {"budget": 2, **changes}
        with pytest.raises(petl.InputError):
            search.evolve(
                [3, 3], given.pop("budget"), convex, state=first, stages=ONE_STAGE, **given
            )
