"""Positions of the largest entries of a matrix beside its low-rank part.

GreBsmo: Zhou and Tao 2013, "Greedy Bilateral Sketch, Completion and Smoothing", AISTATS: minimizes
||W - U V - S||_F with rank(U V) <= K and at most N entries in S, by turns, while the rank grows.

Shapes: I in, O out, K rank, N entries. Positions are flat (`row * I + column`) and ascending.
"""

import torch
from torch import Tensor

from petl.ops.sparse import largest_entries

GROWTH = 5  # rows that V gains at a time
ROUNDS = 2  # updates of U, V and S between two of them


@torch.no_grad()
def greedy_positions(weight: Tensor, count: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return the positions of S [N], int64, for a weight [O, I].

    The cardinality of S is given, as in the paper; DSEE's published code has a threshold instead.

    Args:
        weight: W, on any device; computed in float32 there.
        count: N.
        rank: K, from 1.
        generator: on the CPU, of the first row of V.
    """
    W = weight.detach().float()
    V_KI = torch.randn(1, W.shape[1], generator=generator).to(W.device)
    rank = min(rank, *W.shape)
    sparse = torch.zeros_like(W)
    while True:
        for _ in range(ROUNDS):
            dense = W - sparse
            U_OK = torch.linalg.qr(dense @ V_KI.t()).Q
            V_KI = U_OK.t() @ dense
            residual = W - U_OK @ V_KI
            positions = largest_entries(residual, count, torch.int64)
            sparse = torch.zeros_like(W)
            sparse.view(-1)[positions] = residual.view(-1)[positions]
        if len(V_KI) >= rank:
            return positions
        left = residual - sparse
        step = min(GROWTH, rank - len(V_KI))
        # the first rows of R of the complete QR follow from the first columns alone
        Q_OG = torch.linalg.qr(left[:, :step]).Q
        V_KI = torch.cat([V_KI, Q_OG.t() @ left])
