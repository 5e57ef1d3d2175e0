"""The rows of each optimizer step."""

from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest

from petl.data.batch_sampler import (
    Buckets,
    SequentialStepSampler,
    StepSampler,
    best_fit,
    permutation,
)


def steps_of(plan: StepSampler) -> list[list[list[int]]]:
    """The micro-batches of each step, separated by `num_micro_batches`."""
    stream = iter(plan)
    return [
        list(islice(stream, plan.num_micro_batches(s)))
        for s in range(plan.done + 1, plan.steps + 1)
    ]


def dealt(plans: list[StepSampler]) -> list[list[int]]:
    """The rows of all processes in each step, sorted, without spare micro-batches."""
    shares = [
        [
            chain(*pieces[: len(pieces) - plan.num_spare_micro_batches(s)])
            for s, pieces in enumerate(steps_of(plan), plan.done + 1)
        ]
        for plan in plans
    ]
    return [sorted(chain(*step)) for step in zip(*shares, strict=True)]


def test_an_epoch_visits_every_row_once_and_each_epoch_in_another_order():
    batches = list(StepSampler(rows=23, batch_size=5, micro_batch_size=None, steps=10, seed=3))
    first, second = ([*chain(*half)] for half in (batches[:5], batches[5:]))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


def test_the_next_epoch_is_not_the_first_of_the_next_seed():
    assert permutation(23, seed=3, epoch=1) != permutation(23, seed=4, epoch=0)


@pytest.mark.parametrize("done", [1, 4, 5, 7, 13])
def test_resuming_at_any_step_gives_the_remaining_steps(done):
    whole = StepSampler(rows=23, batch_size=5, micro_batch_size=2, steps=14, seed=3)
    rest = StepSampler(rows=23, batch_size=5, micro_batch_size=2, steps=14, seed=3, done=done)
    assert steps_of(rest) == steps_of(whole)[done:]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("micro", [None, 2])
def test_streamed_rows_are_distributed_to_processes_step_by_step(processes, micro):
    """Each process reads the complete stream, and its own rows in ascending order."""
    plans = [
        SequentialStepSampler(20, 5, micro, 4, seed=3, rank=r, processes=processes, done=1)
        for r in range(processes)
    ]
    assert dealt(plans) == [list(range(first, first + 5)) for first in (5, 10, 15)]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("micro", [None, 1, 2, 100])
def test_any_number_of_processes_and_micro_batches_covers_the_same_global_batch(processes, micro):
    reference = [batch for (batch,) in steps_of(StepSampler(23, 5, None, 10, seed=3))]
    plans = [
        StepSampler(23, 5, micro, 10, 3, rank=r, processes=processes) for r in range(processes)
    ]
    assert dealt(plans) == [sorted(batch) for batch in reference]
    for step, shares in enumerate(zip(*map(steps_of, plans), strict=True), start=1):
        # equal numbers, since methods may communicate between processes in each forward pass
        assert {len(share) for share in shares} == {plans[0].num_micro_batches(step)}
        assert all(len(piece) <= (micro or 5) for share in shares for piece in share)


LENGTHS = np.arange(1, 24, dtype=np.int32)  # of 23 rows
BUCKETED = [
    Buckets.of_equal_tokens(LENGTHS, 3, batch_size=5),
    Buckets.of_equal_tokens(LENGTHS, 3, batch_size=5, max_tokens=50),
    Buckets.of_batch_sizes(LENGTHS, {8: 5, 15: 4, 23: 3, 40: 2}),
]


@pytest.mark.parametrize("buckets", BUCKETED)
def test_with_buckets_every_epoch_visits_each_row_once_in_another_order(buckets):
    size = len(buckets.sizes)
    batches = list(StepSampler(23, 5, None, 2 * size, seed=3, buckets=buckets))
    first, second = ([*chain(*half)] for half in (batches[:size], batches[size:]))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second
    together = [{frozenset(rows) for rows in half} for half in (batches[:size], batches[size:])]
    assert together[0] != together[1]
    other = list(StepSampler(23, 5, None, 2 * size, seed=4, buckets=buckets))
    assert batches != other


@pytest.mark.parametrize("buckets", BUCKETED)
def test_rows_of_a_step_are_from_one_bucket_longest_first(buckets):
    for batch in StepSampler(23, 5, None, 30, seed=3, buckets=buckets):
        assert any(set(batch) <= set(rows.tolist()) for rows in buckets.rows)
        assert batch == sorted(batch, key=lambda row: -LENGTHS[row])


@pytest.mark.parametrize("buckets", BUCKETED)
@pytest.mark.parametrize("done", [1, 4, 7, 13])
def test_with_buckets_resuming_at_any_step_gives_the_remaining_steps(buckets, done):
    whole = StepSampler(23, 5, 2, 14, seed=3, buckets=buckets)
    assert steps_of(replace(whole, done=done)) == steps_of(whole)[done:]


@pytest.mark.parametrize("buckets", BUCKETED)
@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("micro", [None, 2])
def test_with_buckets_processes_and_micro_batches_cover_the_same_global_batch(
    buckets, processes, micro
):
    whole = StepSampler(23, 5, None, 14, seed=3, buckets=buckets)
    plans = [
        replace(whole, micro_batch_size=micro, rank=r, processes=processes)
        for r in range(processes)
    ]
    assert dealt(plans) == [sorted(batch) for (batch,) in steps_of(whole)]


def test_a_process_without_rows_still_has_something_to_compute():
    plan = StepSampler(
        rows=7, batch_size=5, micro_batch_size=None, steps=4, seed=0, rank=3, processes=4
    )
    second = steps_of(plan)[1]  # two rows for four processes
    assert plan.num_spare_micro_batches(2) == 1
    assert [len(piece) for piece in second] == [1]


def test_a_text_joins_the_fullest_block_that_has_room():
    assert best_fit([6, 3, 1], 10) == [[0, 1, 2]]
    assert best_fit([7, 5, 3, 2], 10) == [[0, 2], [1, 3]]
    assert best_fit([10, 10], 10) == [[0], [1]]
