"""The largest size of a method within a number of parameters: `train.budget`."""

import logging
from bisect import bisect_left
from collections.abc import Callable
from functools import cache

from transformers import PreTrainedModel

from petl.core.parameters import adapter_parameters
from petl.core.registry import build_config, method, on_shapes, without_data
from petl.core.spec.config import MethodConfig, idle_fields, in_proportion
from petl.core.support import Capability
from petl.core.types import Fields
from petl.errors import InputError
from petl.training.features import RunFeature, Setup

logger = logging.getLogger(__name__)


class ParameterBudget(RunFeature):
    """Chooses the size of the method by `train.budget`."""

    uses = (Capability.SIZE,)

    def before_wrapping(self, setup: Setup, fields: Fields) -> Fields:
        """Return the fields at the largest size that the budget allows."""
        return within_budget(fields, setup.shapes, self.settings)


def within_budget(fields: Fields, build: Callable[[], PreTrainedModel], budget: int) -> Fields:
    """Return `fields` at the largest size whose adapter has at most `budget` parameters.

    The method chooses which fields change (`MethodConfig.sized`): for most, `r`, and `lora_alpha`
    (`alpha` of LoHa and LoKr) in proportion to it.

    Args:
        fields: of the method, its name included.
        build: makes the base model on the meta device.

    Raises:
        InputError: the method has no size that rises with its rank, or its smallest one is above
            the budget.
    """

    @cache  # each count builds the model on the meta device
    def count(size: int) -> int | None:
        """Return the number of parameters at a size; None if the method does not allow it."""
        try:
            model = on_shapes(build, without_data(resized(fields, size))[0])
        except InputError:
            if size == 1:  # no smaller size to try
                raise
            return None
        return adapter_parameters(model)

    name, smallest, second = fields["name"], count(1), count(2)
    assert smallest is not None
    if second is not None and second <= smallest:  # it falls for RandLoRA, is constant for AdaLoRA
        raise InputError(
            f"train.budget={budget} is not possible: method {name!r} does not grow with its rank; "
            "leave it null and set the fields of the method"
        )
    if smallest > budget:
        raise InputError(
            f"train.budget={budget} is too small: method {name!r} has {smallest} parameters at its "
            "smallest size here; raise the budget, or let method.target_modules match fewer modules"
        )
    size = largest(count, budget)
    chosen, used = resized(fields, size), count(size)
    config = build_config(**chosen)
    # a method that grows while it trains limits its growth by the budget as well
    bounds = config.bounded(budget) if isinstance(config, MethodConfig) else {}
    if bounds:
        chosen |= bounds
        used = adapter_parameters(on_shapes(build, without_data(chosen)[0]))
    changed = {key: value for key, value in chosen.items() if value != fields.get(key)}
    size_fields = ", ".join(f"{key}={value}" for key, value in changed.items()) or "size unchanged"
    logger.info("budget of %s parameters: %s, %s used", f"{budget:,}", size_fields, f"{used:,}")
    return chosen


def resized(fields: Fields, size: int) -> Fields:
    """Return `fields` with those changed that give the method this size.

    Raises:
        InputError: the method has no size.
    """
    config = build_config(**fields)
    if isinstance(config, MethodConfig):
        sizes = config.sized(size)
        # what gave it another size, such as reduction_factor, gives way
        vars(config).update(sizes)
        idle = idle_fields(config, fields["name"]).keys() - sizes.keys()
        return {**{k: v for k, v in fields.items() if k not in idle}, **sizes}
    if not hasattr(config, "r"):
        raise InputError(
            f"method {fields['name']!r} has no rank to choose: leave train.budget null"
        )
    # for methods whose rank must be a multiple of something
    step = method(fields["name"]).variant(fields).rank_step
    return {**fields, **in_proportion(config, step * size)}


def largest(count: Callable[[int], int | None], budget: int) -> int:
    """Return the largest size from 1 whose count, which grows with it, is at most `budget`.

    Counts are nearly linear in the size, so the next size to try is a linear extrapolation. Of
    sizes with equal counts, as those of LoKr from full matrices on, it is the smallest.
    """
    low, at_low, high = 1, count(1) or 0, None
    slope = max(1, (count(2) or 2 * at_low) - at_low)
    while high is None or high - low > 1:
        size = low + max(1, (budget - at_low) // slope)
        if high is not None and size >= high:
            size = (low + high) // 2
        parameters = count(size)
        if parameters is None or parameters > budget or parameters == at_low:
            high = size
        else:
            slope = max(1, (parameters - at_low) // (size - low))
            low, at_low = size, parameters
    if low > 1 and count(low - 1) == at_low:
        return bisect_left(range(low), at_low, lo=1, key=lambda size: count(size) or 0)
    return low
