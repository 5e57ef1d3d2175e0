"""What a table of trials says: which setting is the best, and how sure that is.

A pure function of the table, so that a table of finished runs can be replayed. Scores are such that
higher is better: losses are negated. A score is a sum of the setting's own level, what the seed
does, and what the choice of rows does, of which most is common to all settings, since their trials
are scored on the same rows:

- seeds: pooled over settings with several seeds, and with `PRIOR` degrees of freedom as much as the
  rows on which two adapters of one quality disagree.
- selection: the best of several is the luckiest of them. Scores are drawn to the mean of the
  contenders by the share of noise in their spread (James and Stein 1961; Efron and Morris 1975).
- rows: of validation and test rows, which are independent.
- length: the score at the full length follows a power law of the steps, with an exponent that is
  not known (`EXPONENTS`).

Variances are added; the interval is Student's with the smallest of their degrees of freedom.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from scipy.special import stdtrit

from petl.data.tasks.scores import INTERVAL, RANKING, is_percentage

LEVEL = 0.8  # of intervals
SHARED = 0.7  # correlation of two adapters' errors on the same rows; assumption
CONTENDER = 3.0  # standard errors of a difference, within which a setting may be the best
EXPONENTS = (0.25, 0.5, 1.0)  # of learning curves; assumption
PRIOR = 4  # degrees of freedom of what is assumed of seeds; assumption
LOWER = 4.0  # factor by which a rate is lowered at most, where it is not told apart; assumption
LOSSES_VARY = 0.5  # standard deviation of the losses of rows, in their mean; assumption
NORMAL = 1.959964  # quantile of the 95 % interval of an evaluation
CORRELATIONS = ("pearson", "spearman", "matthews")


class Setting(NamedTuple):
    """What is chosen."""

    method: str
    rank: int
    rate: float


@dataclass(frozen=True)
class Trial:
    """The validation score of one training.

    Attributes:
        score: the metric; negated if lower is better.
        loss: negated; decides between equal scores.
    """

    setting: Setting
    seed: int
    steps: int
    score: float
    loss: float = 0.0


@dataclass(frozen=True)
class RowErrors:
    """Standard errors of a score for the choice of rows.

    Attributes:
        validation, test: of the validation and of the test rows.
        count: of validation rows.
    """

    validation: float
    test: float
    count: int

    @property
    def of_difference(self) -> float:
        """Variance that one of two settings adds to their difference on the same rows."""
        return (1 - SHARED) * self.validation**2


class Interval(NamedTuple):
    """An estimate with its interval of `LEVEL`.

    Attributes:
        degrees: of freedom.
    """

    center: float
    low: float
    high: float
    degrees: float


def interval(center: float, variance: float, degrees: float) -> Interval:
    """Return Student's interval."""
    reach = float(stdtrit(degrees, (1 + LEVEL) / 2)) * math.sqrt(variance)
    return Interval(center, center - reach, center + reach, degrees)


def row_error(metric: str, scores: Mapping[str, float], count: int) -> float:
    """Return the standard error of a score on `count` rows, for their choice.

    Args:
        metric: its name.
        scores: an evaluation.
    """
    value = scores[metric]
    if f"{metric}{INTERVAL}" in scores:
        return scores[f"{metric}{INTERVAL}"] / NORMAL * math.sqrt(scores.get("rows", count) / count)
    if is_percentage(metric):  # exact for proportions; assumption for F1, ROUGE and the like
        inside = (value * count + 1) / (count + 2)  # not 0 after all right answers
        return math.sqrt(inside * (1 - inside) / count)
    if metric.endswith(CORRELATIONS):
        return (1 - value**2) / math.sqrt(max(1, count - 1))
    return LOSSES_VARY * abs(value) / math.sqrt(count)


def possible(metric: str, higher_is_better: bool) -> tuple[float, float]:
    """Return the least and the largest value that a score can have."""
    if is_percentage(metric) or metric.partition("_at_")[0] in RANKING:
        return 0.0, 1.0
    if metric.endswith(CORRELATIONS):
        return -1.0, 1.0
    return (-math.inf if higher_is_better else 0.0), math.inf  # a loss


@dataclass(frozen=True)
class Evidence:
    """Trials, and what they say.

    Attributes:
        trials: with finite scores.
        rows: errors for the choice of rows.
        full: steps of a run of full length.
        simplest: the method that wins ties.
    """

    trials: Sequence[Trial]
    rows: RowErrors
    full: int
    simplest: str = "lora"
    excluded: Collection[Setting] = field(default_factory=frozenset)

    # Noise

    @cached_property
    def seeds(self) -> tuple[float, int]:
        """Variance between seeds of one setting, and its degrees of freedom."""
        groups: dict[tuple[Setting, int], list[float]] = defaultdict(list)
        for trial in self.trials:
            groups[trial.setting, trial.steps].append(trial.score)
        several = [scores for scores in groups.values() if len(scores) > 1]
        degrees = sum(len(scores) - 1 for scores in several)
        squares = sum(statistics.variance(scores) * (len(scores) - 1) for scores in several)
        # two seeds are told apart at least by the rows on which they happen to disagree
        prior = PRIOR * self.rows.of_difference
        return (squares + prior) / (degrees + PRIOR), degrees + PRIOR

    @cached_property
    def deciding(self) -> list[Trial]:
        """The trials of the longest length at which settings can be compared."""
        at: dict[int, list[Trial]] = defaultdict(list)
        for trial in self.trials:
            if trial.setting not in self.excluded:
                at[trial.steps].append(trial)
        several = [steps for steps, found in at.items() if len({t.setting for t in found}) > 1]
        return at[max(several or at)]

    @cached_property
    def means(self) -> dict[Setting, float]:
        """The mean score of each setting at that length."""
        found: dict[Setting, list[float]] = defaultdict(list)
        for trial in self.deciding:
            found[trial.setting].append(trial.score)
        return {setting: statistics.fmean(scores) for setting, scores in found.items()}

    def _noise(self, setting: Setting) -> float:
        """Variance of a setting's mean, apart from what all settings have in common."""
        count = sum(trial.setting == setting for trial in self.deciding)
        return self.seeds[0] / count + self.rows.of_difference

    @cached_property
    def shrinkage(self) -> tuple[float, float, int]:
        """Share of noise in the spread of the contenders, their mean, and how many they are."""
        # settings that are out of the running would hide how much of the spread is noise
        best = max(self.means, key=lambda setting: self.means[setting])
        noise = self._noise(best)
        near = [m for m in self.means.values() if self.means[best] - m <= self._reach(noise)]
        if len(near) < 2:
            return 0.0, self.means[best], 1
        spread = statistics.variance(near)
        return (min(1.0, noise / spread) if spread else 1.0), statistics.fmean(near), len(near)

    def _reach(self, noise: float) -> float:
        return CONTENDER * math.sqrt(2 * noise)

    # The choice

    def ranked(self, method: str | None = None) -> list[Setting]:
        """The settings at the deciding length, the best first; of one method, or of all."""
        found = [s for s in self.means if method is None or s.method == method]
        return sorted(found, key=lambda s: (self.means[s], self._loss(s)), reverse=True)

    def _loss(self, setting: Setting) -> float:
        """The mean negated loss of a setting at that length."""
        return statistics.fmean(t.loss for t in self.deciding if t.setting == setting)

    def difference(self, one: Setting, other: Setting) -> Interval:
        """Return by how much one setting is better than another, on the same rows."""
        # the center is drawn to 0, the variance is not: settings that tie are not surely equal
        gain = (1 - self.shrinkage[0]) * (self.means[one] - self.means[other])
        return interval(gain, self._noise(one) + self._noise(other), self.seeds[1])

    @cached_property
    def gain(self) -> Interval | None:
        """The difference of the best setting to the best of the simplest method, if that is not it.

        None as well without trials of the simplest method.
        """
        best, simple = self.ranked()[0], self.ranked(self.simplest)
        return None if not simple or best == simple[0] else self.difference(best, simple[0])

    @cached_property
    def best(self) -> Setting:
        """The setting to take: of another method than the simplest only if it is surely better."""
        if self.gain is None or self.gain.low > 0:
            return self.lowest(self.ranked()[0])
        return self.lowest(self.ranked(self.simplest)[0])

    def lowest(self, best: Setting) -> Setting:
        """Return the same with the lowest rate that is not told apart from it in short trials.

        Longer trainings want lower rates.
        """
        if self.deciding[0].steps >= self.full:
            return best
        alike = (s for s in self.means if s[:2] == best[:2])
        same = [s for s in alike if best.rate / LOWER <= s.rate <= best.rate]
        near = [setting for setting in same if not self.apart(best, setting)]
        return min(near, key=lambda setting: setting.rate)

    def apart(self, best: Setting, other: Setting) -> bool:
        """True if means differ by more than a standard error, as `petl study` tells rates apart."""
        error = math.sqrt(self._noise(best) + self._noise(other))
        return self.means[best] - self.means[other] > error

    @cached_property
    def next_best(self) -> Setting | None:
        """The best of the other settings."""
        return next((setting for setting in self.ranked() if setting != self.best), None)

    # The prediction

    def predicted(self) -> tuple[Interval, dict[str, float]]:
        """Return the test score of a run of the best setting at full length, and its variances.

        The variances are by source: seeds, rows, selection and length.
        """
        share, mean, count = self.shrinkage
        noise, (seeds, degrees) = self._noise(self.best), self.seeds
        drawn = share * (self.means[self.best] - mean)
        last = [t for t in self.trials if t.setting == self.best and t.steps == self.full]
        variances = {
            "seeds": seeds,  # of the run that is predicted
            "rows": SHARED * self.rows.validation**2 + self.rows.test**2,
            "selection": (1 - share) * noise + share * noise / count,
            "length": 0.0,
        }
        if last and self.deciding[0].steps < self.full:
            # trained again, on rows and seeds of which the rows alone are those of the choice
            drawn *= self.rows.of_difference / noise
            center = statistics.fmean(trial.score for trial in last) - drawn
            variances["selection"] = seeds / len(last) + self.rows.of_difference
        else:
            further, variances["length"] = self.extrapolated(self.best)
            center = self.means[self.best] - drawn + further
        smallest = max(1, min(degrees, self.rows.count - 1))
        return interval(center, sum(variances.values()), smallest), variances

    def extrapolated(self, setting: Setting) -> tuple[float, float]:
        """Return what the full length adds to the deciding one, and the variance of that.

        A power law with offset goes through the means of the two longest lengths, one for each of
        `EXPONENTS`; the middle one counts, and half their range is a standard deviation.
        """
        found: dict[int, list[float]] = defaultdict(list)
        for trial in self.trials:
            if trial.setting == setting:
                found[trial.steps].append(trial.score)
        longest = max(found)
        if longest >= self.full:
            return 0.0, 0.0
        shorter = max((steps for steps in found if steps < longest), default=None)
        if shorter is None:  # of one length: nothing is known but that noise hides it
            return 0.0, self.seeds[0] + self.rows.of_difference
        rise = statistics.fmean(found[longest]) - statistics.fmean(found[shorter])
        factors = sorted(
            (longest**-c - self.full**-c) / (shorter**-c - longest**-c) for c in EXPONENTS
        )
        middle, half = factors[len(factors) // 2], (factors[-1] - factors[0]) / 2
        noise = middle**2 * (self.seeds[0] + self.rows.of_difference) * 2
        # a curve that falls is one that noise has bent: it is not followed downwards
        return max(0.0, rise) * middle, (rise * half) ** 2 + noise

    # What constraints cost

    def forgone(self, settings: Iterable[Setting]) -> tuple[Setting, Interval] | None:
        """Return the best of settings that a constraint excludes, and what it would add.

        Compared at its length with an allowed setting of the same method and rate, if one was tried
        there, since its own rate was not chosen; else with the best allowed one. None: none of them
        was tried.
        """
        # of each setting, the longest trial of a length that an allowed one has too
        lengths = {trial.steps for trial in self.trials if trial.setting not in self.excluded}
        common = (trial for trial in self.trials if trial.steps in lengths)
        tried = {t.setting: t for t in sorted(common, key=lambda t: t.steps)}
        found = [tried[setting] for setting in settings if setting in tried]
        if not found:
            return None
        best = max(found, key=lambda trial: (trial.score, trial.loss))
        at_length = [trial for trial in self.trials if trial.steps == best.steps]
        allowed = [trial for trial in at_length if trial.setting not in self.excluded]
        method, _, rate = best.setting
        alike = [t for t in allowed if (t.setting.method, t.setting.rate) == (method, rate)]
        others = [trial.score for trial in alike or allowed]
        variance = 2 * (self.seeds[0] + self.rows.of_difference)
        return best.setting, interval(best.score - max(others), variance, self.seeds[1])
