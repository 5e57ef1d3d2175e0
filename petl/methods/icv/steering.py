"""Steering vectors: their direction from differences of hidden states, and shifts of the states.

Shapes: N demonstrations, D numbers of a difference, H width of the hidden states.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

TIE = 1e-4  # entries of a left singular vector that differ by less count as equally large
SMALLEST = 1e-9  # singular values below this fraction of the norm of all differences are rounding


class Steer(NamedTuple):
    """A vector [H], its strength, and True for the cosine factor."""

    vector: Tensor
    strength: float
    cosine: bool


def direction(differences: Tensor, rank: int = 1) -> Tensor:
    """Return the mean of the differences plus their first principal components, [D] float32.

    The components are the first `rank` right singular vectors of the centered differences, at most
    N - 1. The sign of each is fixed: the largest entry of its left vector is positive, the first of
    those that are equally large.

    Args:
        differences: [N, D], N at least 1.
        rank: number of components.
    """
    X = differences.double()
    mean = X.mean(0)
    centered = X - mean
    left, S = _left_vectors(centered)
    count = min(rank, len(X) - 1, int((SMALLEST * X.norm() < S).sum()))
    total = mean
    for u in left.t()[:count]:
        size = u.abs()
        first = int((size >= size.max() - TIE).nonzero()[0])
        component = centered.t() @ u * u[first].sign()
        total = total + component / component.norm()
    return total.float()


def _left_vectors(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors of X [N, D] as columns, and the singular values."""
    if len(X) >= X.shape[1]:
        U, S, _ = torch.linalg.svd(X, full_matrices=False)
        return U, S
    # of the N x N Gram matrix, which is small however wide the differences are
    squares, U = torch.linalg.eigh(X @ X.t())
    return U.flip(1), squares.flip(0).clamp(min=0).sqrt()


def unit(x: Tensor) -> Tensor:
    """Return x over its norm in the last dimension; zero stays zero, with a finite gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm == 0, 1.0, norm)


def steered(x: Tensor, steers: Iterable[Steer], *, keep_norm: bool) -> Tensor:
    """Shift hidden states by the mean of several vectors, and return them in the dtype of `x`.

    With the unit vectors u of x and v of a vector, its strength w and the factor
    f = 1 + max(0, cos(x, -v)), which is 1 without `cosine`, over m vectors:

        |x| unit(u + (1/m) sum w f v)        with `keep_norm`
        x + (1/m) sum w vector               without, and without `cosine`

    Args:
        x: [..., H], in any precision; it is computed in float32 at least.
        steers: one or more.
        keep_norm: keep the norm of each state.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    states = x.to(dtype)
    shifts = []
    if not keep_norm:
        shifts = [steer.strength * steer.vector.to(dtype) for steer in steers]
        return (states + sum(shifts) / len(shifts)).to(x.dtype)
    u = unit(states)
    for vector, strength, cosine in steers:
        v = unit(vector.to(dtype))
        factor = 1 + (-(u @ v)).clamp(min=0).unsqueeze(-1) if cosine else 1.0
        shifts.append(strength * factor * v)
    norm = states.norm(dim=-1, keepdim=True)
    return (norm * unit(u + sum(shifts) / len(shifts))).to(x.dtype)
