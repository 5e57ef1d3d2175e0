"""Ranks of blocks from their importance, and the config that has them."""

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import nn

from petl.core.method import Method
from petl.core.registry import METHODS, method_of
from petl.core.spec.facts import facts_of
from petl.core.support import Capability
from petl.errors import InputError, UnsupportedError, shown
from petl.training.ranks.importance import blocks_of

Ranked = Any  # a PeftConfig with `r` and `rank_pattern`; an alpha and its pattern, or none


def allocate(
    importance: Mapping[str, float],
    mean: int,
    *,
    least: int = 1,
    most: int | None = None,
    power: float = 1.0,
    cost: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return a rank for each block, in proportion to importance^power, with the given mean.

    The real ranks are m w, w = importance^power, clamped to [least, most], with the m for which
    sum(cost rank) = mean sum(cost). Blocks with w = 0 count as the limit of small w. Ranks are
    rounded down, and the rest is distributed one by one by largest remainder, at equal remainders
    to the larger w. With the same cost everywhere the sum is exactly `mean` times the number of
    blocks, else it stays below the budget by less than one step of a block that may still grow.

    Args:
        importance: by block, at least 0, as `block_importance` returns it.
        mean: of the ranks, weighted by cost.
        least: smallest rank of a block, from 1.
        most: largest rank of a block; None: no bound.
        power: 0 gives each block the mean.
        cost: parameters of one rank of each block; None: 1 each.

    Raises:
        InputError: a bound that the mean does not keep, a power below 0, an importance or a cost
            that is out of range, or no block.
    """
    check_bounds(mean, least, most, power)
    w = {key: weight_of(key, S, power) for key, S in importance.items()}
    if not w:
        raise InputError("importance={} has no blocks; pass the result of block_importance")
    cost = dict.fromkeys(w, 1) if cost is None else dict(cost)
    if cost.keys() != w.keys() or any(c < 1 for c in cost.values()):
        raise InputError(
            f"cost={shown(cost)} needs a number of parameters, at least 1, for each block of "
            "importance, and no others"
        )
    most = None if most is None else int(most)
    budget = mean * sum(cost.values())
    real = real_ranks(w, cost, budget, least, math.inf if most is None else most)
    ranks = {key: math.floor(value) for key, value in real.items()}
    left = budget - sum(cost[key] * rank for key, rank in ranks.items())
    order = sorted(w, key=lambda key: (ranks[key] - real[key], -w[key]))
    grows = True
    while grows:  # the second pass and later ones: what costs leave over
        grows = False
        for key in order:
            if cost[key] <= left and (most is None or ranks[key] < most):
                ranks[key] += 1
                left -= cost[key]
                grows = True
    return ranks


def check_bounds(mean: int, least: int, most: int | None, power: float) -> None:
    """Raise InputError unless 1 <= least <= mean <= most, and power is a number from 0."""
    for name, value in (("mean", mean), ("least", least), ("most", most)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(f"{name}={value!r} is not an integer")
    if least < 1:
        raise InputError(f"least={least} is below 1, the smallest rank")
    if least > mean:
        raise InputError(f"least={least} is above {mean}, the mean of the ranks; lower it")
    if most is not None and most < mean:
        raise InputError(f"most={most} is below {mean}, the mean of the ranks; raise it")
    if not 0 <= power < math.inf:
        raise InputError(f"power={power} is not a number from 0")


def weight_of(key: str, S: float, power: float) -> float:
    """Return S^power, in float range.

    Raises:
        InputError: an importance that is negative or not finite, or a power that is too large.
    """
    if not 0 <= S < math.inf:
        raise InputError(f"the importance of {key} is {S}, not a number from 0")
    try:
        return S**power
    except OverflowError:
        raise InputError(f"power={power} is too large for an importance of {S}; lower it") from None


def real_ranks(
    w: Mapping[str, float], cost: Mapping[str, int], budget: int, least: float, most: float
) -> dict[str, float]:
    """Return min(most, max(least, m w)) with the m for which cost times rank sums up to budget.

    The sum rises with m, linearly between the values of m at which a rank reaches a bound.
    """

    def at(m: float) -> dict[str, float]:
        return {key: min(most, max(least, m * value)) for key, value in w.items()}

    def spent(m: float) -> float:
        return sum(cost[key] * rank for key, rank in at(m).items())

    bounds = (least,) if most == math.inf else (least, most)
    corners = sorted({bound / value for value in w.values() if value > 0 for bound in bounds})
    corners = [m for m in corners if m < math.inf]  # of a w that is nearly 0
    low = max((m for m in corners if spent(m) <= budget), default=0.0)
    high = min((m for m in corners if m > low), default=2 * low)
    # between two corners, the same ranks rise with m
    middle = (low + high) / 2 if high > low else 1.0
    slope = sum(cost[key] * value for key, value in w.items() if least < middle * value < most)
    if slope > 0:
        return at(low + (budget - spent(low)) / slope)
    ranks = at(low)
    # all that can rise have reached `most`: the rest goes to blocks with w = 0 in equal parts
    zeros = [key for key, value in w.items() if ranks[key] < most]
    share = (budget - spent(low)) / sum(cost[key] for key in zeros) if zeros else 0.0
    return ranks | {key: min(most, ranks[key] + share) for key in zeros}


# Configs


def check_method(entry: Method) -> None:
    """Raise UnsupportedError, naming those that can, if a method cannot have ranks by block."""
    reason = entry.lacking(Capability.RANKS)
    if reason:
        names = ", ".join(
            sorted(n for n, other in METHODS.items() if not other.lacking(Capability.RANKS))
        )
        over = [name for name, other in METHODS.items() if other.has_inner]
        names += f", and {', '.join(over)} over one of them" if over else ""
        raise UnsupportedError(
            f"method {entry.name!r} cannot have ranks by block: {reason}; methods that can: {names}"
        )


def check_unset(config: PeftConfig) -> None:
    """Raise InputError if a config has ranks or alphas by module already."""
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name, None):
            raise InputError(
                f"{name}={shown(getattr(config, name))} is set already, and ranks by importance "
                "would replace it; leave one of them out"
            )


def with_ranks(config: Ranked, model: nn.Module, ranks: Mapping[str, int]) -> Ranked:
    """Return a copy of a config in which the modules of each block have its rank.

    Sets `rank_pattern`, and `alpha_pattern` where the config has one, so that the scaling, alpha
    over rank (with rsLoRA: over its root), is the same everywhere. Keys are regular expressions for
    the paths of a block's modules, the longest first, since PEFT takes the first that matches.

    Args:
        config: of a method with `rank_pattern`, see `petl.build_config`.
        model: the base model.
        ranks: by block path, at least 1; modules of other blocks keep `config.r`.

    Raises:
        UnsupportedError: the method has no rank by block.
        InputError: a pattern is set already, a path is no block of the model, or a rank is not an
            integer from 1.
    """
    entry = method_of(config)
    if entry is None:
        raise InputError(
            f"{type(config).__name__} is not the config of a method; petl.ranks.with_ranks takes "
            "one that petl.build_config gives"
        )
    check_method(entry)
    check_unset(config)
    blocks = blocks_of(model)
    for path, rank in ranks.items():
        if path not in blocks:
            raise InputError(
                f"{path!r} is no block of {type(model).__name__}; its blocks: {shown(list(blocks))}"
            )
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise InputError(f"the rank of {path} is {rank!r}, not an integer from 1")
    config = copy.deepcopy(config)
    # of equal length in the order of the model
    paths = sorted(ranks, key=len, reverse=True)
    config.rank_pattern = {pattern_of(path): ranks[path] for path in paths}
    if hasattr(config, "alpha_pattern"):
        config.alpha_pattern = {pattern_of(path): alpha_of(config, ranks[path]) for path in paths}
    return config


def pattern_of(path: str) -> str:
    """Return the regular expression for the paths of the modules of a block."""
    return rf"{re.escape(path)}\..*"


def alpha_of(config: Ranked, rank: int) -> float:
    """Return the alpha with which a module of this rank has the scaling of one of rank `r`."""
    alpha = config.lora_alpha if hasattr(config, "lora_alpha") else config.alpha
    ratio = rank / config.r
    scaled = alpha * (math.sqrt(ratio) if facts_of(config).use_rslora else ratio)
    # an integer where possible, as PEFT annotates it
    return round(scaled) if math.isclose(scaled, round(scaled), rel_tol=1e-12) else scaled
