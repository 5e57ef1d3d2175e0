"""The two formulas by which CFSP prunes: how much of each block stays, and which channels.

Wang et al. 2025 (arXiv:2409.13199). Shapes: D width of the model, F channels of an MLP.

Where we depart from the authors' code: importances are means over tokens, and `gain` has the
division of their sums over 128 x 1,024 tokens by 1e4, so that the numbers do not depend on the size
of the calibration set; a channel with a weight of zeros has the score of its other terms, not nan.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from petl.errors import InputError

GAIN = 128 * 1024 / 1e4  # of the published recipe
MARGIN = 1.05  # of the largest ratio below 1


def keep_ratios(
    importance: Mapping[str, float], sparsity: float, *, a: float = 1.0, gain: float = GAIN
) -> dict[str, float]:
    """Return the fraction of each block that stays, whose mean is `1 - sparsity`.

    With z the sigmoid of a gain (S - mean S), it is z / mean z (1 - sparsity). If the largest would
    reach 1, the deviations of z from its mean are reduced.

    Args:
        importance: S by block, means over tokens.
        sparsity: fraction to remove, in [0, 1).
        a: how much the ratios differ; 0: not at all.
        gain: factor of the deviations of S.

    Raises:
        InputError: a sparsity that is out of range, or no block.
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity={sparsity} is not in [0, 1)")
    if not importance:
        raise InputError("importance={} has no blocks; pass the result of block_importance")
    middle, kept = sum(importance.values()) / len(importance), 1 - sparsity
    z = {key: sigmoid(a * gain * (S - middle)) for key, S in importance.items()}
    mean, largest = sum(z.values()) / len(z), max(z.values())
    if largest > mean and largest / mean * kept >= 1:
        factor = mean * (1 / kept - 1) / (largest - mean) / MARGIN
        z = {key: mean + factor * (value - mean) for key, value in z.items()}
    return {key: value / mean * kept for key, value in z.items()}


def sigmoid(x: float) -> float:
    """Return the logistic function of x, without an overflow for any x."""
    return math.exp(min(x, 0.0)) / (1 + math.exp(-abs(x)))


def channel_scores(
    down: Tensor,
    norms: Tensor,
    up: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    b: float = 1.0,
    c: float = 1.0,
) -> Tensor:
    """Return the score of each channel of an MLP, [F]; those with the largest scores stay.

    It is the mean over D of (V / colsum V + |up|^T / colsum |up|^T + |gate|^T / colsum |gate|^T)
    times norms^c, with V = |down| norms^b; terms that are not given are left out. As in the
    authors' code, a column sum is over D, one number for each channel: each term then has the mean
    1 / D, so that the order of the channels is that of their norms.

    Args:
        down: weight of the down projection, [D, F].
        norms: norm of each channel's input of it over the calibration rows, [F].
        up: weight of the up projection, [F, D].
        gate: weight of the gate projection, [F, D].
        b: exponent of the norms in V.
        c: exponent of the norms.

    Raises:
        InputError: the shapes do not fit.
    """
    D, F = down.shape
    if norms.shape != (F,):
        raise InputError(f"norms has shape {list(norms.shape)}, and down [D, F] needs [{F}]")
    for name, weight in (("up", up), ("gate", gate)):
        if weight is not None and weight.shape != (F, D):
            raise InputError(f"{name} has shape {list(weight.shape)}, and down needs [{F}, {D}]")
    norms = norms.float()
    terms = [down.float().abs() * norms**b]
    terms += [weight.float().abs().T for weight in (up, gate) if weight is not None]
    total = sum(_over_column_sums(term) for term in terms)
    assert isinstance(total, Tensor)
    return (total * norms**c).mean(0)


def _over_column_sums(term: Tensor) -> Tensor:
    sums = term.sum(0)
    return term / sums.where(sums > 0, 1.0)
