"""Handing out ranks to modules."""

from collections.abc import Sequence


def grant(
    scores: Sequence[float],
    ranks: Sequence[int],
    limit: int,
    *,
    top_h: int,
    step: int,
    left: int,
) -> dict[int, int]:
    """How many components each chosen module receives, by its index.

    The `top_h` modules with the highest scores get `step` each, the last one what is `left`; among
    equal scores the first module wins, and a module at the limit is passed over.

    Args:
        scores: of each module.
        ranks: of each module now.
        limit: the highest rank a module may have.
        top_h: modules to choose.
        step: components for each.
        left: components that there are to give in all.
    """
    grants: dict[int, int] = {}
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        count = min(step, limit - ranks[index], left - sum(grants.values()))
        if count > 0:
            grants[index] = count
        if len(grants) == top_h:
            break
    return grants
