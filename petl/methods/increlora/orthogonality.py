"""Distance of the rows of many matrices from orthonormality, with gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gram_distances(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the Frobenius norm `||M M^T - 1||` of each M [R, I], and its gradient.

    Matrices of one shape are computed together. Autograd records nothing, and autocast does not
    lower the precision.

    Returns:
        The norms, 0-d each; and the gradients, [R, I] each, 0 where the norm is 0.
    """
    groups: dict[tuple, list[int]] = {}
    for i, M in enumerate(matrices):
        groups.setdefault((M.shape, M.dtype, M.device), []).append(i)
    norms, slopes = list(matrices), list(matrices)
    for members in groups.values():
        M = torch.stack([matrices[i] for i in members])
        # in half precision M M^T - 1 would cancel
        with torch.autocast(M.device.type, enabled=False):
            gap = M @ M.mT
            gap.diagonal(dim1=1, dim2=2).sub_(1)
            norm = torch.linalg.vector_norm(gap, dim=(1, 2))
            # d||G||/dM = 2 G M / ||G|| with G = M M^T - 1, symmetric; clamped: 0 where G is 0
            factor = 2 / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            slope = (gap @ M).mul_(factor[:, None, None])
        for i, n, s in zip(members, norm.unbind(), slope.unbind(), strict=True):
            norms[i], slopes[i] = n, s
    return norms, slopes
