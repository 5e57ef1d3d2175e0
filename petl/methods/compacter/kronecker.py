"""Products with sums of Kronecker products, without forming the matrix.

Shapes: T tokens, N terms of the sum, I in, O out, Q rank. The matrix is `H = sum_n R_n (x) B_n`
[I, O] with rules R [N, N, N] (term, row, column) and B [N, I/N, O/N], or `B_n = left_n right_n`.
Row a I/N + j, column c O/N + l of term n is `R_n[a, c] B_n[j, l]`, the usual order.
"""

import torch
from torch import Tensor

from petl.ops import Ctx


def times_factored(
    x: Tensor,
    rule: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return `x H + bias + residual`, [..., O], for factored B, in three products (backward: six).

    Intermediate tensors have terms and rank as rows: thin products are fastest in that layout, and
    nothing is copied. G sums can be computed together: x [G, T, I], bias [G, 1, O], and a leading G
    in the other shapes; autograd then derives the gradients.

    Args:
        x: [..., I].
        rule: R [N, N, N].
        left: [N, I/N, Q].
        right: [N, Q, O/N].
        bias: [O].
        residual: [..., O]. All tensors have one dtype.
    """
    if torch.is_grad_enabled() and left.dim() == 3:
        return _KroneckerProduct.apply(x, rule, left, right, bias, residual)
    y = _up(_mixed(_down(x, left), rule), right, bias, residual)
    return y.view(*x.shape[:-1], y.shape[-1])  # not -1, which no rows would leave open


class _KroneckerProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        rule: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        u = _down(x, left)
        z = _mixed(u, rule)
        ctx.save_for_backward(x, rule, left, right, u, z)
        y = _up(z, right, bias, residual)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y.detach()  # no view, as in `_LowRankLinear`

    @staticmethod
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        x, rule, left, right, u, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # double backward: the saved u and z have no graph
            u = _down(x, left)
            z = _mixed(u, rule)
        N, Q, columns = right.shape
        g = grad.reshape(-1, columns)  # [T N, O/N]
        # the transposed products of forward, in reverse order
        to_z = right.flatten(0, 1) @ g.t()
        to_u = _mixed(to_z, rule.mT)
        to_x = to_rule = to_left = to_right = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = (to_u.t() @ _rows(left)).view(x.shape)
        if ctx.needs_input_grad[1]:
            to_rule = u.view(N, -1, N).mT.bmm(to_z.view(N, -1, N))
        if ctx.needs_input_grad[2]:
            to_left = (to_u @ x.reshape(-1, left.shape[1])).view(N, Q, -1).mT
        if ctx.needs_input_grad[3]:
            to_right = (z @ g).view(right.shape)
        if ctx.needs_input_grad[4]:
            to_bias = grad.reshape(-1, N * columns).sum(0)
        return to_x, to_rule, to_left, to_right, to_bias, grad if ctx.needs_input_grad[5] else None


def _down(x: Tensor, left: Tensor) -> Tensor:
    """Multiply each block of `x` by each term's left factor, [N Q, T N]."""
    return _rows(left) @ x.reshape(*left.shape[:-3], -1, left.shape[-2]).mT


def _mixed(u: Tensor, rule: Tensor) -> Tensor:
    """Mix the blocks a of `u` [N Q, T N] into blocks c by each term's rule, for each token."""
    N = rule.shape[-1]
    rules = rule.reshape(-1, N, N)
    return u.view(len(rules), -1, N).bmm(rules).view(u.shape)


def _up(z: Tensor, right: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Sum z [N Q, T N] times the right factors over the terms, plus bias and residual, [T, O]."""
    *groups, N, _, columns = right.shape
    right = right.flatten(-3, -2)
    if residual is None:
        out = z.mT @ right
    else:
        add = torch.baddbmm if groups else torch.addmm
        out = add(residual.reshape(*groups, -1, columns), z.mT, right)
    out = out.view(*groups, -1, N * columns)
    return out if bias is None else out.add_(bias)


def _rows(left: Tensor) -> Tensor:
    """Return the left factors as rows, [N Q, I/N]."""
    return left.mT.flatten(-3, -2)


def times_full(x: Tensor, rule: Tensor, weight: Tensor) -> Tensor:
    """Return `x H`, [..., O], for x [..., I] and B = weight [N, I/N, O/N], in two products.

    The rule is applied on the narrower side, which costs less.
    """
    N, rows, columns = weight.shape
    # weight first, so that the rule mixes N x O/N numbers per token instead of N x I/N
    if rows > columns:
        u = weight.transpose(1, 2).reshape(N * columns, rows) @ x.reshape(-1, rows).t()
        z = u.view(N, -1, N).bmm(rule).sum(0)  # [(l, T), c]
        out = z.view(columns, -1, N).permute(1, 2, 0)
    else:
        u = x.reshape(-1, N, rows).permute(2, 0, 1).reshape(-1, N)  # [(j, T), a]
        z = u @ rule.transpose(0, 1).reshape(N, N * N)  # [(j, T), (n, c)]
        z = z.view(rows, -1, N, N).permute(2, 0, 1, 3).reshape(N * rows, -1)  # [(n, j), (T, c)]
        out = z.t() @ weight.reshape(N * rows, columns)
    return out.reshape(*x.shape[:-1], N * columns)
