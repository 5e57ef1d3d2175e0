"""Allocation of components to modules."""

from petl.methods.increlora.importance import grant


def test_the_highest_scores_get_a_step_each():
    assert grant([1, 9, 3, 5], [7] * 4, top_h=2, step=2, left=100) == {1: 2, 3: 2}


def test_the_last_module_gets_the_remainder():
    assert grant([1, 9, 3, 5], [7] * 4, top_h=3, step=2, left=5) == {1: 2, 3: 2, 2: 1}
    assert grant([1, 9, 3, 5], [7] * 4, top_h=3, step=2, left=2) == {1: 2}


def test_among_equal_scores_the_first_module_wins():
    assert list(grant([2, 7, 7, 7], [7] * 4, top_h=2, step=1, left=9)) == [1, 2]
    assert list(grant([0, 0, 0], [7] * 3, top_h=2, step=1, left=9)) == [0, 1]


def test_full_modules_are_skipped_and_nearly_full_ones_get_what_fits():
    assert grant([9, 8, 7, 6], [0, 1, 3, 3], top_h=3, step=2, left=9) == {1: 1, 2: 2, 3: 2}
    assert grant([1, 2], [0, 0], top_h=2, step=1, left=3) == {}


def test_a_budget_allows_complete_components_and_costly_modules_are_skipped():
    costs = [5, 20, 5, 5]
    assert grant([4, 9, 3, 1], [7] * 4, top_h=3, step=2, left=9, costs=costs, budget=36) == {
        1: 1,
        0: 2,
        2: 1,
    }
    assert grant([1, 9], [7, 7], top_h=2, step=1, left=9, costs=[5, 20], budget=19) == {0: 1}
