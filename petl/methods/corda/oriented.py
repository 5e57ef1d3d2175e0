"""Singular value decomposition of a weight, oriented by the second moment of its inputs (CorDA).

Shapes: I in, O out, K = min(I, O), R kept. With C [I, I] the second moment, damped to C':
W C' = U S V^T and Vt = V^T C'^-1, hence W = U S Vt.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class DampedInverse(NamedTuple):
    """C' [I, I] and its inverse."""

    matrix: Tensor
    inverse: Tensor


class OrientedFactors(NamedTuple):
    """U [O, K], S [K] descending and Vt [K, I] with W = U diag(S) Vt, or R components of them."""

    U: Tensor
    S: Tensor
    Vt: Tensor


def damped(C: Tensor, damp: float, tolerance: float) -> DampedInverse:
    """Return C' = C + d mean(diag C) 1 for C [I, I], and its inverse.

    d starts at `damp` and doubles until the Frobenius norm of C' C'^-1 - 1 is below `tolerance`.

    Raises:
        ValueError: C is zero or not finite.
    """
    mean = float(C.diagonal().mean())
    if not (math.isfinite(mean) and mean > 0):
        raise ValueError(
            f"the mean second moment of the inputs is {mean:g}; it must be finite and above 0"
        )
    one = torch.eye(len(C), dtype=C.dtype, device=C.device)
    while True:
        # relative to the mean of the diagonal, so that the scale of the inputs does not matter
        shifted = C + damp * mean * one
        inverse, singular = torch.linalg.inv_ex(shifted)
        if not singular and float(torch.dist(shifted @ inverse, one)) < tolerance:
            return DampedInverse(shifted, inverse)
        damp *= 2


def oriented_svd(W: Tensor, C: DampedInverse) -> OrientedFactors:
    """Return the oriented decomposition of W [O, I], with all K components, in the dtype of C."""
    # W C' = U S V^T, then C'^-1 undoes the orientation: W = U S (V^T C'^-1)
    U, S, Vh = torch.linalg.svd(W.to(C.matrix) @ C.matrix, full_matrices=False)
    return OrientedFactors(U, S, Vh @ C.inverse)


def truncated(svd: OrientedFactors, rank: int, *, leading: bool) -> OrientedFactors:
    """Return the first `rank` components of a decomposition, or the last."""
    part = slice(None, rank) if leading else slice(len(svd.S) - rank, None)
    return OrientedFactors(svd.U[:, part], svd.S[part], svd.Vt[part])


def balanced(svd: OrientedFactors, scale: float) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and B [O, R] with `scale * B A` = U diag(S) Vt, each with the root of S."""
    root_R = (svd.S / scale).sqrt()
    return root_R[:, None] * svd.Vt, svd.U * root_R


def log_compactness(C: DampedInverse, out_features: int) -> float:
    """Return log(sqrt(O sigma_max) / sigma_min) of C', the log of CorDA++'s pi; less is better."""
    values = torch.linalg.eigvalsh(C.matrix)
    # rounding can make the smallest eigenvalue negative
    smallest = values[0].clamp(min=torch.finfo(values.dtype).tiny)
    return float(0.5 * (out_features * values[-1]).log() - smallest.log())
