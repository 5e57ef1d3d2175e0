"""Sampling of tasks at a temperature: how many rows of each an epoch has, and which."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from petl.data.batch_sampler import StepSampler
from petl.data.task_mixture import TaskMixture, rows_of_tasks

SIZES = [40, 10, 3]


def tasks():
    """Ids of rows in mixed order."""
    return np.random.default_rng(0).permutation(np.repeat([0, 1, 2], SIZES)).tolist()


def sampler_at(temperature, **changes):
    mixture = TaskMixture.of_temperature(tasks(), 3, temperature)
    sampler = StepSampler(
        rows=53, batch_size=8, micro_batch_size=3, steps=28, seed=4, mixture=mixture
    )
    return replace(sampler, **changes)


@pytest.mark.parametrize("temperature", [1, 2, 10, 1e6])
def test_rows_of_a_task_are_in_proportion_to_the_root_of_its_size(temperature):
    found = rows_of_tasks(SIZES, temperature)
    powers = [size ** (1 / temperature) for size in SIZES]
    exact = [53 * power / sum(powers) for power in powers]
    assert sum(found) == 53
    assert all(abs(count - share) < 1 for count, share in zip(found, exact, strict=True))


def test_temperature_one_is_the_sizes_and_a_large_one_makes_tasks_equal():
    assert rows_of_tasks(SIZES, 1) == (40, 10, 3)
    assert rows_of_tasks([40, 10, 4], 1e6) == (18, 18, 18)
    assert rows_of_tasks([5, 0, 5], 3) == (5, 0, 5)


@pytest.mark.parametrize("temperature", [1, 3])
def test_an_epoch_has_these_rows_in_random_order(temperature):
    ids, counts = tasks(), rows_of_tasks(SIZES, temperature)
    sampler = sampler_at(temperature)
    visited = [row for epoch in (0, 1) for batch in sampler.epoch(epoch) for row in batch]
    for epoch in (visited[:53], visited[53:]):
        assert Counter(ids[row] for row in epoch) == dict(enumerate(counts))
    assert visited[:53] != visited[53:]
    # a step mixes tasks: not one task after the other
    assert len({ids[row] for row in visited[:8]}) > 1
    if temperature == 1:
        assert sorted(visited[:53]) == sorted(visited[53:]) == list(range(53))


def test_rows_of_a_task_are_visited_equally_often_over_epochs():
    ids, sampler = tasks(), sampler_at(3)
    visits = Counter(row for epoch in range(9) for batch in sampler.epoch(epoch) for row in batch)
    for task in range(3):
        own = [visits[row] for row, id_ in enumerate(ids) if id_ == task]
        assert max(own) - min(own) <= 1
    assert min(visits[row] for row, id_ in enumerate(ids) if id_ == 2) > 9  # repeated in an epoch


def test_steps_depend_on_the_seed_alone_and_resume_anywhere():
    whole = list(sampler_at(3).global_batches())
    assert list(sampler_at(3, done=11).global_batches()) == whole[11:]
    assert list(sampler_at(3, seed=5).global_batches()) != whole
    assert len(whole) == 28


def test_processes_share_out_the_rows_of_one():
    whole = list(sampler_at(3).global_batches())
    parts = [sampler_at(3, rank=rank, processes=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        shared = []
        for part in parts:
            own = part.micro_batches(list(part.global_batches())[step])
            spare = part.num_spare_micro_batches(step + 1)
            shared += [row for micro in own[: len(own) - spare] for row in micro]
        assert sorted(shared) == sorted(batch)
