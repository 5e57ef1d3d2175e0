"""The schedule of accumulation and selection. Steps are completed optimizer steps, from 1.

R is `reselection_steps`, A `selection_accumulation_steps`, T `total_step`: candidate gradients are
accumulated in the first A of every R updates, and weights are exchanged after the last of those, up
to update T.
"""

import math

from petl.methods.sparse.config import SparseConfig


def accumulates(config: SparseConfig, step: int) -> bool:
    """True if gradients of update `step` are accumulated, for a selection up to `total_step`."""
    since = (step - 1) % config.reselection_steps  # updates since the last cycle began
    selection = step - 1 - since + config.selection_accumulation_steps
    early = config.selection_algorithm == "rigl" and since < config.selection_accumulation_steps
    return early and (config.total_step is None or selection <= config.total_step)


def is_due(config: SparseConfig, step: int) -> bool:
    """True if update `step` needs work: accumulation, selection, or (at step 1) the checks."""
    accumulating = accumulates(config, step) or accumulates(config, step + 1)
    due = step == 1 or accumulating or _ends(config, step)
    return config.selection_algorithm != "none" and due


def selects(config: SparseConfig, step: int) -> bool:
    """True if weights are exchanged after update `step`."""
    due = config.selection_algorithm != "none" and _ends(config, step)
    return due and config.total_step is not None and step <= config.total_step


def _ends(config: SparseConfig, step: int) -> bool:
    """True if `step` is the last one of an accumulation."""
    return step % config.reselection_steps == config.selection_accumulation_steps


def exchange_fraction(config: SparseConfig, step: int, *, is_random: bool = True) -> float:
    """The fraction of the weights that the selection after update `step` may exchange.

    Args:
        is_random: True if the training began with a random set; that of an earlier training, which
            the first selection must not replace as a whole, is none.
    """
    assert config.total_step is not None
    linear, progress = config.reselection_rate_policy == "linear", step / config.total_step
    full = linear if config.full_first_reselection is None else config.full_first_reselection
    # the first selection replaces a random set
    if full and is_random and step == config.selection_accumulation_steps:
        return 1.0
    left = 1 - progress if linear else (1 + math.cos(math.pi * progress)) / 2
    return config.initial_reselection_rate * left
