"""Scores of an evaluation: which of two is better, and how well a proportion is known.

Better is the better metric, and of equal ones the lower loss. Checkpoints, learning rates, settings
of a sweep and entries of a comparison are all chosen by `quality`; of equal qualities, each of them
keeps the earlier.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

LOSSES = ("loss", "mse")  # names of the loss in an evaluation
# in an evaluation next to the scores: what they average over
COUNTS = ("rows", "tokens", "words", "answers")
LEVEL = 0.95
# metrics that are a proportion of independent examples (`rows`): others, such as F1, have no
# interval of this kind, and a bootstrap needs the answers to single examples, which are not saved
PROPORTIONS = ("accuracy", "exact_match")


def quality(
    scores: Mapping[str, Any], metric: str, *, higher_is_better: bool
) -> tuple[float, float]:
    """Return the sort key of an evaluation, higher is better: its metric, then its negated loss.

    A value that is absent or not finite counts as the worst.
    """
    loss = next((scores[name] for name in LOSSES if name in scores), math.inf)
    sign = 1 if higher_is_better else -1
    return worst_if_not_finite(sign * scores.get(metric, math.nan)), worst_if_not_finite(-loss)


def worst_if_not_finite(value: float) -> float:
    """Return the value, or minus infinity in place of one that is not finite."""
    return value if math.isfinite(value) else -math.inf


def not_finite(scores: Mapping[str, float]) -> str | None:
    """Return the name of the first score that is NaN or infinite; None if there is none.

    The perplexity is left out: it overflows with a loss that is finite.
    """
    names = (name for name in scores if name != "perplexity")
    return next((name for name in names if not math.isfinite(scores[name])), None)


def wilson(proportion: float, count: float, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a proportion of `count` examples.

    Method 3 of Newcombe 1998 (Statistics in Medicine 17, 857-872). Unlike p ± 1.96 standard errors
    it stays between 0 and 1 and has a width after all right (or all wrong) answers.
    """
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = proportion + z2 / (2 * count)
    reach = math.sqrt(z2 * (proportion * (1 - proportion) + z2 / (4 * count)) / count)
    low, high = ((center + sign * reach) / (1 + z2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)  # rounding may pass 0 or 1


def interval(metric: str, value: float, scores: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the interval of a metric's value on the examples of an evaluation; None without one.

    Args:
        value: the metric, or its mean over evaluations on the same examples.
        scores: an evaluation, which has the number of examples.
    """
    if metric not in PROPORTIONS or not scores.get("rows"):
        return None
    return wilson(value, scores["rows"])


def sign_test(one: int, other: int) -> float:
    """Return the two-sided p-value of the exact sign test, McNemar's for right and wrong answers.

    The probability of a split as uneven as this, if an example that tells two models apart is as
    likely to favor one as the other.

    Args:
        one: number of examples that favor the first model.
        other: number of those that favor the second.
    """
    total = one + other
    ways = sum_of_ways = 1  # of choosing as many of `total` examples; integers, which are exact
    for chosen in range(min(one, other)):
        ways = ways * (total - chosen) // (chosen + 1)
        sum_of_ways += ways
    return min(1.0, 2 * sum_of_ways / 2**total)
