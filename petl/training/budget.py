"""The size of a method that spends a given number of parameters: `train.budget`."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from petl.core.adapter_file import adapter_parameters
from petl.core.dry_run import on_shapes, without_data
from petl.core.registry import build_config, method
from petl.core.spec.config import MethodConfig, in_proportion
from petl.errors import InputError

logger = logging.getLogger(__name__)


def within_budget(
    fields: Mapping[str, Any], build: Callable[[], PreTrainedModel], budget: int
) -> dict[str, Any]:
    """`fields` with the largest size whose adapter has at most `budget` parameters.

    Which fields that are is the method's say (`MethodConfig.sized`): for most, `r`, and the scaling
    `lora_alpha` in proportion to it.

    Args:
        fields: of the method, its name included.
        build: makes the base model on the meta device.

    Raises:
        InputError: the method has no size that rises with its rank, or its smallest one is above
            the budget.
    """

    @cache
    def count(size: int) -> int | None:
        """Parameters at a size; None where the method refuses it."""
        try:
            model = on_shapes(build, without_data(resized(fields, size))[0])
        except InputError:
            if size == 1:
                raise
            return None
        return adapter_parameters(model)

    name, least, second = fields["name"], count(1), count(2)
    assert least is not None
    if second is not None and second <= least:  # of RandLoRA it falls, of AdaLoRA it stays
        raise InputError(
            f"the size of method {name!r} does not rise with its rank; leave train.budget null "
            "and set its fields"
        )
    if least > budget:
        raise InputError(
            f"train.budget={budget} is too small: method {name!r} has {least} parameters at its "
            "smallest size here; raise the budget, or let method.target_modules match fewer modules"
        )
    size = largest(count, budget)
    chosen, planned = resized(fields, size), count(size)
    config = build_config(**chosen)
    bounds = config.bounded(budget) if isinstance(config, MethodConfig) else {}
    if bounds:
        chosen |= bounds
        planned = adapter_parameters(on_shapes(build, without_data(chosen)[0]))
    changed = {key: value for key, value in chosen.items() if value != fields.get(key)}
    said = ", ".join(f"{key}={value}" for key, value in changed.items()) or "the size that it has"
    logger.info("budget of %s parameters: %s, %s used", f"{budget:,}", said, f"{planned:,}")
    return chosen


def resized(fields: Mapping[str, Any], size: int) -> dict[str, Any]:
    """`fields` with those that give the method this size.

    Raises:
        InputError: the method has no size.
    """
    config: Any = build_config(**fields)
    own = getattr(config, "sized", None)
    if own is None and not hasattr(config, "r"):
        raise InputError(
            f"method {fields['name']!r} has no rank to choose; leave train.budget null"
        )
    if own is not None:
        return {**fields, **own(size)}
    step = method(fields["name"]).given(fields).rank_step
    return {**fields, **in_proportion(config, step * size)}


def largest(count: Callable[[int], int | None], budget: int) -> int:
    """The largest size from 1 whose count, which rises with it, is not above `budget`.

    Counts are close to straight lines, so the next size to try is read off a line.
    """
    low, at_low, high = 1, count(1) or 0, None
    slope = max(1, (count(2) or 2 * at_low) - at_low)
    while high is None or high - low > 1:
        guess = low + max(1, (budget - at_low) // slope)
        if high is not None and guess >= high:
            guess = (low + high) // 2
        found = count(guess)
        if found is None or found > budget:
            high = guess
        else:
            slope = max(1, (found - at_low) // (guess - low))
            low, at_low = guess, found
    return low
