"""When weights are watched and exchanged. Steps are completed optimizer steps, from 1.

R is `reselection_steps`, A `selection_accumulation_steps`, T `total_step`: gradients are watched in
the first A of every R updates, and weights exchanged after the last of those, up to update T.
"""

import math
from typing import Any


def observes(config: Any, step: int) -> bool:
    """Whether the gradients of update `step` are watched, for a selection that will happen."""
    since = (step - 1) % config.reselection_steps
    selection = step - 1 - since + config.selection_accumulation_steps
    watches = config.selection_algorithm == "rigl" and since < config.selection_accumulation_steps
    return watches and (config.total_step is None or selection <= config.total_step)


def is_due(config: Any, step: int) -> bool:
    """Whether anything is to be done after update `step`, be it to check that all is well."""
    watches = observes(config, step) or observes(config, step + 1)
    return config.selection_algorithm != "none" and (step == 1 or watches or _ends(config, step))


def selects(config: Any, step: int) -> bool:
    """Whether weights are exchanged after update `step`."""
    due = config.selection_algorithm != "none" and _ends(config, step)
    return due and step <= config.total_step


def _ends(config: Any, step: int) -> bool:
    """Whether `step` is the last of a phase."""
    return step % config.reselection_steps == config.selection_accumulation_steps


def share(config: Any, step: int) -> float:
    """Which share of the weights the selection after update `step` may exchange."""
    linear, progress = config.reselection_rate_policy == "linear", step / config.total_step
    full = linear if config.full_first_reselection is None else config.full_first_reselection
    if full and step == config.selection_accumulation_steps:
        return 1.0
    left = 1 - progress if linear else (1 + math.cos(math.pi * progress)) / 2
    return config.initial_reselection_rate * left
