"""The rows that an epoch visits when tasks are sampled at a temperature.

Task t with n_t of the N rows gets N n_t^(1/T) / sum_s n_s^(1/T) rows of each epoch, rounded so that
they add up to N: T = 1 is sampling by size, and a large T gives all tasks as many rows. Raffel et
al. 2020 (arXiv:1910.10683, section 3.5.2) draw each row at these probabilities; here an epoch has
exactly these numbers of rows, in random order.

A task's rows are visited in passes over all of them, each in another random order, and an epoch
goes on where the one before it ended: of a small task all rows are repeated equally often, of a
large one none is repeated before all were visited. The rows of an epoch depend on the seed and the
number of the epoch alone, so that a run resumes at any step, with any number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from petl.data.batch_sampler import Ints, epoch_generator, random_permutation

# number of the first random stream of the tasks, after those of epochs; assumption: fewer epochs
FIRST_STREAM = 500_000


@dataclass(frozen=True)
class TaskMixture:
    """How many rows of each task an epoch visits.

    Attributes:
        members: the numbers of each task's rows.
        counts: rows of each task in an epoch; their sum is the number of all rows.
    """

    members: tuple[Ints, ...]
    counts: tuple[int, ...]

    @classmethod
    def of_temperature(cls, tasks: Sequence[int], number: int, temperature: float) -> "TaskMixture":
        """Return the mixture of rows with these task ids, of which there are `number`."""
        ids = np.asarray(tasks)
        members = tuple(np.flatnonzero(ids == task) for task in range(number))
        return cls(members, rows_of_tasks([len(own) for own in members], temperature))

    @classmethod
    def of_shares(cls, tasks: Sequence[int], shares: Sequence[float]) -> "TaskMixture":
        """Return the mixture of rows with these task ids, in proportion to shares."""
        ids = np.asarray(tasks)
        members = tuple(np.flatnonzero(ids == task) for task in range(len(shares)))
        weights = np.asarray(shares, float) * [len(own) > 0 for own in members]
        return cls(members, apportioned(len(ids), weights))

    def order(self, seed: int, epoch: int) -> list[int]:
        """The rows of an epoch in the order in which they are visited."""
        parts = [
            self.members[task][self.positions(task, seed, epoch)]
            for task in range(len(self.counts))
        ]
        visited = np.concatenate(parts)
        return visited[random_permutation(len(visited), epoch_generator(seed, epoch))].tolist()

    def positions(self, task: int, seed: int, epoch: int) -> Ints:
        """The places among the rows of a task that an epoch visits."""
        rows, count = len(self.members[task]), self.counts[task]
        if not rows:  # held out for validation
            return np.zeros(0, int)
        first, end = epoch * count, (epoch + 1) * count
        passes = range(first // rows, -(-end // rows))
        streams = (FIRST_STREAM + number * len(self.counts) + task for number in passes)
        orders = [random_permutation(rows, epoch_generator(seed, stream)) for stream in streams]
        begin = first - passes.start * rows
        return np.concatenate([np.zeros(0, int), *orders])[begin : begin + count]


def rows_of_tasks(sizes: Sequence[int], temperature: float) -> tuple[int, ...]:
    """Return the rows of each task in an epoch of as many rows as all tasks have together.

    Of equal remainders, the earlier task gets the row.
    """
    weights = np.asarray(sizes, float) ** (1 / temperature) * (np.asarray(sizes) > 0)
    return apportioned(sum(sizes), weights)


def apportioned(rows: int, weights: np.ndarray) -> tuple[int, ...]:
    """Return how many of the rows each weight gets, rounded by largest remainders."""
    exact = rows * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: rows - counts.sum()]] += 1
    return tuple(counts.tolist())
