"""Singular value decomposition of a weight, oriented by the second moment of its inputs (CorDA).

Shapes: I in, O out, K = min(I, O), R kept. With C [I, I] the second moment, damped to C':
W C' = U S V^T and Vt = V^T C'^-1, hence W = U S Vt.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Damped(NamedTuple):
    """C' [I, I] and its inverse."""

    matrix: Tensor
    inverse: Tensor


class Oriented(NamedTuple):
    """U [O, K], S [K] descending and Vt [K, I] with W = U diag(S) Vt, or some of their columns."""

    U: Tensor
    S: Tensor
    Vt: Tensor


def damped(C: Tensor, damp: float, tolerance: float) -> Damped:
    """C' = C + d mean(diag C) 1 of C [I, I], and its inverse.

    d starts at `damp` and doubles until the Frobenius norm of C' C'^-1 - 1 is below `tolerance`.

    Raises:
        ValueError: C is zero or not finite.
    """
    mean = float(C.diagonal().mean())
    if not (math.isfinite(mean) and mean > 0):
        raise ValueError(f"the mean second moment of the inputs is {mean:g}")
    one = torch.eye(len(C), dtype=C.dtype, device=C.device)
    while True:
        shifted = C + damp * mean * one
        inverse, singular = torch.linalg.inv_ex(shifted)
        if not singular and float(torch.dist(shifted @ inverse, one)) < tolerance:
            return Damped(shifted, inverse)
        damp *= 2


def oriented_svd(W: Tensor, C: Damped) -> Oriented:
    """The oriented decomposition of W [O, I], full K, in the dtype of C."""
    U, S, Vh = torch.linalg.svd(W.to(C.matrix) @ C.matrix, full_matrices=False)
    return Oriented(U, S, Vh @ C.inverse)


def kept(svd: Oriented, rank: int, *, leading: bool) -> Oriented:
    """The first `rank` columns of a decomposition, or the last."""
    part = slice(None, rank) if leading else slice(len(svd.S) - rank, None)
    return Oriented(svd.U[:, part], svd.S[part], svd.Vt[part])


def balanced(svd: Oriented, scale: float) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] with `scale * B A` = U diag(S) Vt, S shared evenly between them."""
    root_R = (svd.S / scale).sqrt()
    return root_R[:, None] * svd.Vt, svd.U * root_R


def log_compactness(C: Damped, out_features: int) -> float:
    """log(sqrt(O sigma_max) / sigma_min) of C': that of CorDA++'s pi, smaller is better."""
    values = torch.linalg.eigvalsh(C.matrix)
    smallest = values[0].clamp(min=torch.finfo(values.dtype).tiny)
    return float(0.5 * (out_features * values[-1]).log() - smallest.log())
