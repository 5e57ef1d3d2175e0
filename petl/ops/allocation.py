"""Handing out ranks to modules."""

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
    """How many components each chosen module receives, by its index.

    The `top_h` modules with the highest scores get `step` each, the last one what is `left`; among
    equal scores the first module wins, and a module without room is passed over, as is one of
    which the budget buys no component.

    Args:
        scores: of each module.
        room: components that each module can still take.
        top_h: modules to choose.
        step: components for each.
        left: components that there are to give in all.
        costs: parameters of a component of each module, where there is a budget.
        budget: parameters that all grants may have; None: any number.
    """
    grants: dict[int, int] = {}
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        count = min(step, room[index], left - sum(grants.values()))
        if budget is not None:
            spent = sum(costs[i] * n for i, n in grants.items())
            count = min(count, (budget - spent) // costs[index])
        if count > 0:
            grants[index] = count
        if len(grants) == top_h:
            break
    return grants
