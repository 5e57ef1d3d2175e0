"""How many channels each block keeps."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petl.adapters.shrink.counts import counts_by_block, even_count, group_count
from petl.errors import InputError
from petl.training.ranks import keep_ratios


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple", "expected"),
    [(3072, 0.3, 8, 2152), (3072, 0.5, 8, 1536), (96, 0.4, 4, 56), (20, 0.9, 8, 8), (7, 0.5, 1, 4)],
)
def test_an_even_count_is_the_nearest_multiple(width, sparsity, multiple, expected):
    assert even_count(width, sparsity, multiple) == expected


@pytest.mark.parametrize(
    ("groups", "sparsity", "expected"), [(8, 0.3, 5), (3, 0.5, 1), (10, 0.9, 1), (2, 0.9, 1)]
)
def test_groups_are_rounded_down_and_one_stays(groups, sparsity, expected):
    assert group_count(groups, sparsity) == expected


BLOCKS = st.lists(st.floats(0.001, 0.9), min_size=1, max_size=12)


@given(BLOCKS, st.floats(0.05, 0.95), st.sampled_from([1, 4, 8]), st.integers(8, 200))
def test_counts_by_block_meet_the_goal_and_follow_importance(values, sparsity, multiple, width):
    importance = {str(i): value for i, value in enumerate(values)}
    widths = dict.fromkeys(importance, width)
    try:
        counts = counts_by_block(widths, importance, sparsity, multiple)
    except InputError:
        # all multiples of the blocks together are within one of the goal
        assert round((1 - sparsity) * width * len(values) / multiple) * multiple >= (
            width // multiple * multiple * len(values)
        )
        return
    assert all(multiple <= n <= width and n % multiple == 0 for n in counts.values())
    least, most = multiple * len(values), width // multiple * multiple * len(values)
    goal = min(most, max(least, (1 - sparsity) * width * len(values)))
    assert abs(sum(counts.values()) - goal) <= multiple / 2 + 1e-6
    order = sorted(importance, key=importance.__getitem__)
    for less, more in pairwise(order):
        assert counts[less] <= counts[more] or importance[less] == importance[more]


def test_counts_by_block_are_near_the_ratios_in_blocks_of_other_widths():
    importance = {"a": 0.1, "b": 0.3, "c": 0.2}
    widths = {"a": 400, "b": 800, "c": 600}
    ratios = keep_ratios(importance, 0.4)
    counts = counts_by_block(widths, importance, 0.4, 8)
    scale = 0.6 * 1800 / sum(ratios[path] * widths[path] for path in widths)
    assert sum(counts.values()) == 1080
    for path in widths:
        assert counts[path] == pytest.approx(scale * ratios[path] * widths[path], abs=24)
