"""The share of weights to prune after each optimizer step."""

from typing import Any


def sparsity_after(step: int, config: Any) -> float:
    """Return the share of weights to prune after optimizer step `step`, from 0.

    Cubic, as in Zhu and Gupta 2017, "To Prune, or Not to Prune" (arXiv:1710.01878).
    """
    total, first, last = config.total_step, config.initial_sparsity, config.final_sparsity
    start, end = config.initial_warmup * total, total - config.final_warmup * total
    if step <= start:
        return first
    if step > end:
        return last
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3
