"""Importance of low-rank updates for the loss: score per step, and exponential smoothing.

Shapes: I in, O out, R rank, T tokens, N modules. With the update M = scale * B A, [O, I], and its
gradient G = dL/dM = g^T x, of which only a block is in memory at a time, the score of a module is
S = sum |M * G|. AdaLoRA smooths it over steps t, arXiv:2303.10512, equations 9 to 11:
I_t = beta1 I_(t-1) + (1 - beta1) S_t, U_t = beta2 U_(t-1) + (1 - beta2) |S_t - I_t|.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from petl.ops import Ctx

BLOCK_BYTES = 2**27  # maximum size of a block of the gradient G


class _RankWatch(torch.autograd.Function):
    """Identity on y whose backward computes the score and gives it to `probe` as its gradient."""

    @staticmethod
    def forward(
        ctx: Ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, probe: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.scale = scale
        return y.detach()  # no view, as in `_LowRankLinear`

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        x, A, B = ctx.saved_tensors
        score = ctx.scale * update_score(grad, x, A, B)
        return grad, None, None, None, None, score.float()


def watch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, probe: Tensor) -> Tensor:
    """Return `y`; in backward `probe` receives `scale * sum |B A * g^T x|` as its gradient.

    Args:
        y: [..., O], output of the layer whose update is a multiple of `B A`.
        x: [..., I], input of the update.
        A: [R, I].
        B: [O, R].
        scale: a positive factor: that of the update, and any normalization of the score.
        probe: a 0-d leaf that requires a gradient; its value is not used.
    """
    return _RankWatch.apply(y, x, A, B, scale, probe)


def update_score(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, *, block_bytes: int = BLOCK_BYTES
) -> Tensor:
    """Return `sum |B A * grad^T x|`, 0-d, for grad [..., O], x [..., I], A [R, I], B [O, R].

    Computed in float32 at least, block by block of rows of [O, I], of at most `block_bytes` each.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    with torch.autocast(grad.device.type, enabled=False):
        g_TO, x_TI = (t.reshape(-1, t.shape[-1]) for t in (grad, x.to(dtype)))
        rows = max(1, block_bytes // (x_TI.shape[1] * dtype.itemsize))
        A, B = A.to(dtype), B.to(dtype)
        # the 1-norm of the product's entries, block by block
        sums = [
            torch.linalg.vector_norm((g.to(dtype).t() @ x_TI).mul_(b @ A), ord=1)
            for g, b in zip(g_TO.split(rows, 1), B.split(rows), strict=True)
        ]
        return torch.stack(sums).sum()


def smooth(score_N: Tensor, ema_N2: Tensor, beta1: float, beta2: float) -> Tensor:
    """Return (I, U), [N, 2], after a step with these scores; unchanged if a score is not finite."""
    importance_N = torch.lerp(score_N, ema_N2[:, 0], beta1)
    spread_N = torch.lerp((score_N - importance_N).abs(), ema_N2[:, 1], beta2)
    # an overflow under mixed precision would stay in the moving averages for ever
    finite = score_N.isfinite().all()
    return torch.where(finite, torch.stack([importance_N, spread_N], dim=1), ema_N2)


# Allocation of ranks to modules


def grant(
    scores: Sequence[float],
    room: Sequence[int],
    *,
    top_h: int,
    step: int,
    left: int,
    costs: Sequence[int] = (),
    budget: int | None = None,
) -> dict[int, int]:
    """Return the number of components that each chosen module receives, by its index.

    The `top_h` modules with the highest scores get `step` each, the last one the remainder of
    `left`. Of equal scores the first module wins. Modules without room, or for which the budget is
    too small, are skipped.

    Args:
        scores: score of each module.
        room: components that each module can still take.
        top_h: number of modules to choose.
        step: components for each of them.
        left: components to distribute in total.
        costs: parameters of one component of each module; needed with a budget.
        budget: maximum parameters of all new components; None: no limit.
    """
    grants: dict[int, int] = {}
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        # limited by step, by room and by what is left
        count = min(step, room[index], left - sum(grants.values()))
        if budget is not None:
            spent = sum(costs[i] * n for i, n in grants.items())
            count = min(count, (budget - spent) // costs[index])
        if count > 0:
            grants[index] = count
        if len(grants) == top_h:
            break
    return grants
