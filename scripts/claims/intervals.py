"""A mean difference over seeds and test examples: its interval, and what would narrow it.

D [S, N] has the difference of example n with seed s: +1 if only the first contender is right, -1 if
only the second is. Both the seeds and the examples are samples of those that a user may have, so
that

    d_sn = mean + seed_s + example_n + rest_sn

with independent terms: the two-way model of random effects with one observation in each cell
(Searle, Casella and McCulloch 1992, Variance Components, chapter 4). The variance of the mean is

    V = (M_seed + M_example - M_rest) / (S N)

with the mean squares of the analysis of variance, and its degrees of freedom follow Satterthwaite
(1946). An interval over seeds alone would leave out that another test set gives another mean, and
one over examples alone that another seed does. A measure of whole runs, such as seconds, has N = 1:
what is left is the t interval over seeds.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
MAX_SEEDS = 30  # more are not proposed: more test rows are then the better buy
MAX_ROWS = 10**6


@dataclass(frozen=True)
class Estimate:
    """A mean difference and what is known of its variance.

    Attributes:
        differences: by seed, the mean over the test examples; at least two.
        rows: number of test examples N; 1 for a measure of whole runs.
        example_square: mean square of the examples.
        rest_square: mean square of what is left.
    """

    differences: dict[str, float]
    rows: int
    example_square: float
    rest_square: float

    @property
    def seeds(self) -> int:
        """The number of seeds S."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """The mean over seeds and examples."""
        return float(np.mean(list(self.differences.values())))

    @property
    def seed_square(self) -> float:
        """Mean square of the seeds."""
        return self.rows * float(np.var(list(self.differences.values()), ddof=1))

    @property
    def variance(self) -> float:
        """The variance of the mean; never below that of seeds, or of examples, alone."""
        S, N = self.seeds, self.rows
        largest = max(self.seed_square, self.example_square)
        return max(self.seed_square + self.example_square - self.rest_square, largest) / (S * N)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the variance; infinite if all differences are equal."""
        S, N = self.seeds, self.rows
        squares = self.seed_square**2 / (S - 1)
        if N > 1:
            squares += self.example_square**2 / (N - 1)
            squares += self.rest_square**2 / ((S - 1) * (N - 1))
        return (self.variance * S * N) ** 2 / squares if squares else math.inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the confidence interval of the mean."""
        half = half_width(self.variance, self.freedom, level)
        return self.mean - half, self.mean + half

    def predicted_half_width(self, seeds: int, rows: int) -> float:
        """Return the half width to expect with other numbers of seeds and test examples.

        Degrees of freedom are taken as those of the seeds alone, so that it errs to the wide side.
        """
        rest = self.rest_square
        of_seeds = max(0.0, self.seed_square - rest) / self.rows
        of_examples = max(0.0, self.example_square - rest) / self.seeds
        variance = of_seeds / seeds + of_examples / rows + rest / (seeds * rows)
        return half_width(variance, seeds - 1, LEVEL)

    def enough(self, half: float) -> tuple[int, int] | None:
        """Return the seeds and test rows with which the half width is at most `half`.

        More seeds first, then more rows, unless whole runs are measured; None if `MAX_SEEDS` and
        `MAX_ROWS` are not enough.
        """
        for seeds, rows in self._options():
            if self.predicted_half_width(seeds, rows) <= half:
                return seeds, rows
        return None

    def _options(self) -> Iterator[tuple[int, int]]:
        rows, most = self.rows, max(self.seeds, MAX_SEEDS)
        while rows <= MAX_ROWS:
            yield from ((seeds, rows) for seeds in range(self.seeds, most + 1))
            if rows == 1:
                return
            rows *= 2


def half_width(variance: float, freedom: float, level: float = LEVEL) -> float:
    """Return half of the width of a t interval."""
    return float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)


def estimate(differences: Mapping[int, np.ndarray]) -> Estimate:
    """Return the estimate for the differences [N] of each of at least two seeds.

    Raises:
        ValueError: fewer than two seeds.
    """
    D = np.stack([differences[seed] for seed in sorted(differences)]).astype(float)
    S, N = D.shape
    if S < 2:
        raise ValueError(f"{S} seeds and {N} examples: an interval needs at least 2 seeds")
    by_seed, by_example = D.mean(axis=1), D.mean(axis=0)
    rest = D - by_seed[:, None] - by_example[None, :] + D.mean()
    return Estimate(
        {str(seed): float(mean) for seed, mean in zip(sorted(differences), by_seed, strict=True)},
        N,
        S * float(by_example.var(ddof=1)) if N > 1 else 0.0,
        float((rest**2).sum()) / ((S - 1) * (N - 1)) if N > 1 else 0.0,
    )
