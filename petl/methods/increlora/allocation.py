"""Allocation of ranks to modules."""

from collections.abc import Sequence


def grant(
    scores: Sequence[float],
    room: Sequence[int],
    *,
    top_h: int,
    step: int,
    left: int,
    costs: Sequence[int] = (),
    budget: int | None = None,
) -> dict[int, int]:
    """Return the number of components that each chosen module receives, by its index.

    The `top_h` modules with the highest scores get `step` each, the last one the remainder of
    `left`. Of equal scores the first module wins. Modules without room, or for which the budget is
    too small, are skipped.

    Args:
        scores: score of each module.
        room: components that each module can still take.
        top_h: number of modules to choose.
        step: components for each of them.
        left: components to distribute in total.
        costs: parameters of one component of each module; needed with a budget.
        budget: maximum parameters of all new components; None: no limit.
    """
    grants: dict[int, int] = {}
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        # limited by step, by room and by what is left
        count = min(step, room[index], left - sum(grants.values()))
        if budget is not None:
            spent = sum(costs[i] * n for i, n in grants.items())
            count = min(count, (budget - spent) // costs[index])
        if count > 0:
            grants[index] = count
        if len(grants) == top_h:
            break
    return grants
