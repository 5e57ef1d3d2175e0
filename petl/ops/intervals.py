"""Confidence intervals of scores that are proportions of the examples."""

import math
from collections.abc import Mapping
from statistics import NormalDist

LEVEL = 0.95
# metrics that are a proportion of independent examples (`rows`): others, such as F1, have no
# interval of this kind, and a bootstrap needs the answers to single examples, which are not saved
PROPORTIONS = ("accuracy", "exact_match")


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
