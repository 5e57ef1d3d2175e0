"""How far rows are from orthonormal, for many matrices at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gram_distances(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The Frobenius norm `||M M^T - 1||` of each M [R, I], and its gradient.

    Matrices of one shape are computed together. Nothing is recorded for a backward pass, and
    autocast does not lower the precision.

    Returns:
        The norms, 0-d each; and the gradients, [R, I] each, 0 where the norm is 0.
    """
    alike: dict[tuple, list[int]] = {}
    for i, M in enumerate(matrices):
        alike.setdefault((M.shape, M.dtype, M.device), []).append(i)
    norms, slopes = list(matrices), list(matrices)
    for members in alike.values():
        M = torch.stack([matrices[i] for i in members])
        with torch.autocast(M.device.type, enabled=False):
            gap = M @ M.mT
            gap.diagonal(dim1=1, dim2=2).sub_(1)
            norm = torch.linalg.vector_norm(gap, dim=(1, 2))
            steep = 2 / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            slope = (gap @ M).mul_(steep[:, None, None])
        for i, n, s in zip(members, norm.unbind(), slope.unbind(), strict=True):
            norms[i], slopes[i] = n, s
    return norms, slopes
