"""Scores by the strength of an adapter of ICV, and the choice of the best."""

from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftModel

from petl.errors import InputError
from petl.methods.icv.config import IcvConfig

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.4)


def scores_by_strength(
    model: PeftModel, score: Callable[[], float], strengths: Iterable[float] = STRENGTHS
) -> dict[float, float]:
    """Return `score()` with the active adapter at each strength; the strength is restored.

    Raises:
        InputError: the active adapter has no strength.
    """
    config: Any = model.active_peft_config
    if not isinstance(config, IcvConfig):
        raise InputError(
            f"the active adapter is one of {type(config).__name__}, which has no strength; "
            "activate one of icv"
        )
    given = config.strength
    found = {}
    try:
        for strength in strengths:
            config.strength = strength
            found[strength] = score()
    finally:
        config.strength = given
    return found


def best_strength(scores: dict[float, float], *, higher_is_better: bool) -> float:
    """Return the strength of the best score, the smallest of equal ones; NaN is the worst.

    Raises:
        InputError: there is no score.
    """
    sign = -1.0 if higher_is_better else 1.0
    known = {strength: sign * score for strength, score in scores.items() if score == score}
    if not known:
        raise InputError(
            f"no strength of {list(scores)} has a score; give method.strength a number"
        )
    return min(known, key=lambda strength: (known[strength], abs(strength)))


def choose_strength(
    model: PeftModel,
    score: Callable[[], float],
    strengths: Iterable[float] = STRENGTHS,
    *,
    higher_is_better: bool = False,
) -> dict[float, float]:
    """Set the strength of the active adapter to the best of `strengths`, and return the scores.

    Args:
        model: its active adapter has a strength, as one of ICV.
        score: computes a score on rows that are no demonstrations, such as the loss.
        strengths: to try.
        higher_is_better: False for a loss.
    """
    scores = scores_by_strength(model, score, strengths)
    config: Any = model.active_peft_config
    config.strength = best_strength(scores, higher_is_better=higher_is_better)
    return scores
