"""Which of two evaluations is better: by the task's metric, of equal ones by the lower loss.

Checkpoints, learning rates, settings of a sweep and entries of a comparison are all chosen by
`quality`; of equal qualities, each of them keeps the earlier.
"""

import math
from collections.abc import Mapping
from typing import Any

LOSSES = ("loss", "mse")  # names of the loss in an evaluation
COUNTS = ("rows", "tokens", "words")  # in an evaluation next to the scores: what they average over


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
