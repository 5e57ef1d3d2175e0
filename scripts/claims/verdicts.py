"""The rule that makes one of four verdicts of an interval.

With an interval (low, high) of the mean difference and a margin chosen before the runs:

    beats     holds            low > 0
              does not hold    high < margin: an advantage that matters is excluded
    equals    holds            -margin < low and high < margin: the two one-sided tests of
                               equivalence (Schuirmann 1987), here at 2.5 % each
              does not hold    high <= -margin or low >= margin
    no_worse  holds            low > -margin: the first of these two tests, non-inferiority
              does not hold    high < -margin
              worse            high < 0, and the margin lies within: by how much cannot be told
    share     holds            high < border, the logarithm of the share
              does not hold    low > border
    all       cannot be told   otherwise

With low > 0, "beats" holds even if high is below the margin: the advantage is real, and small.
"""

from dataclasses import dataclass

from claims.claim import Statement
from claims.intervals import Estimate

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
WORSE = "worse, by how much cannot be told"
NOT_YET = "not finished"


@dataclass(frozen=True)
class Verdict:
    """A verdict, and for one that cannot be told, what it would take.

    Attributes:
        word: one of HOLDS, FAILS, WORSE, OPEN, or NOT_YET for a statement without all of its runs.
        takes: what it would take, for WORSE and OPEN; else "".
    """

    word: str
    takes: str = ""


def word_of(kind: str, low: float, high: float, margin: float) -> str:
    """Return the word for an interval; `margin` as of `Statement.border`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "beats":
        return HOLDS if low > 0 else FAILS if high < margin else OPEN
    if kind == "equals":
        if -margin < low and high < margin:
            return HOLDS
        return FAILS if high <= -margin or low >= margin else WORSE if high < 0 else OPEN
    if kind == "no_worse":
        if low > -margin:
            return HOLDS
        return FAILS if high < -margin else WORSE if high < 0 else OPEN
    if kind == "share":
        return HOLDS if high < margin else FAILS if low > margin else OPEN
    raise ValueError(f"kind={kind!r} is not one of beats, equals, no_worse, share")


def verdict(statement: Statement, estimate: Estimate) -> Verdict:
    """Return the verdict of a statement for an estimate with all of its runs."""
    word = word_of(statement.kind, *estimate.interval(), statement.border)
    return Verdict(word, takes(statement, estimate) if word in (WORSE, OPEN) else "")


def takes(statement: Statement, estimate: Estimate) -> str:
    """Return what it would take to tell, if the true difference is the one that was measured.

    The interval is then as wide as it may be: it gives a verdict in about one of two trials.
    """
    half = needed_half_width(statement.kind, estimate.mean, statement.border)
    enough = estimate.enough(half)
    if enough is None:
        return "the difference lies too near the border of the margin for more runs to tell"
    seeds, rows = enough
    more = f"about {seeds} seeds"
    return more if rows == estimate.rows else f"{more} and {rows:,} test rows"


def needed_half_width(kind: str, mean: float, margin: float) -> float:
    """Return the half width at which an interval around `mean` gives a verdict."""
    if kind == "beats":  # the nearer of the two verdicts: above 0, or below the margin
        return max(mean, margin - mean)
    if kind == "no_worse":
        return abs(mean + margin)
    return abs(margin - (mean if kind == "share" else abs(mean)))
