"""Times are taken by turns; what is made of them."""

import gc

import pytest
from bench.clocks import Spread, Times, in_turn, uncollected


@pytest.mark.thorough
def test_the_floor_runs_before_every_second_candidate():
    calls = []
    steps = {name: (lambda n=name: calls.append(n)) for name in ("a", "b", "c")}
    times = in_turn(lambda: calls.append("floor"), steps, rounds=2, warm_up=1, device="cpu")
    assert calls == ["floor", "a", "b", "floor", "c"] * 3
    assert {name: len(found) for name, found in times.candidate.items()} == {"a": 2, "b": 2, "c": 2}
    assert times.floor["a"] == times.floor["b"] != times.floor["c"]


def test_ratios_are_of_each_round():
    times = Times({"a": [1, 2, 4], "b": [1, 1, 1]}, {"a": [2, 6, 8], "b": [2, 1, 1]})
    assert times.over_floor("a") == Spread(2, 2, 2.5)  # of 2, 3, 2
    assert times.over("a", "b").median == 2  # of 1, 3, 2


@pytest.mark.thorough
def test_what_was_frozen_before_is_frozen_after():
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
        gc.unfreeze()
        with uncollected():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()
