"""Products with sums of Kronecker products that are never formed.

Shapes: T tokens, N terms of the sum, I in, O out, Q rank. The matrix is `H = sum_n R_n (x) B_n`
[I, O] with rules R [N, N, N] (term, row, column) and B [N, I/N, O/N], or `B_n = left_n right_n`.
Row a I/N + j, column c O/N + l of term n is `R_n[a, c] B_n[j, l]`, the usual order.
"""

from torch import Tensor


def times_factored(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`x H` [..., O] for x [..., I], left [N, I/N, Q] and right [N, Q, O/N], in three products.

    Terms and rank are the rows of what lies between them: thin products are fastest so, and
    nothing is copied.
    """
    N, width, Q = left.shape
    u = left.transpose(1, 2).reshape(N * Q, width) @ x.reshape(-1, width).t()  # [N Q, T N]
    z = u.view(N, -1, N).bmm(rule)  # [N, Q T, N]: row a of each token becomes column c
    out = z.view(N * Q, -1).t() @ right.reshape(N * Q, -1)  # [T N, O/N]
    return out.view(*x.shape[:-1], -1)


def times_full(x: Tensor, rule: Tensor, weight: Tensor) -> Tensor:
    """`x H` [..., O] for x [..., I] and weight B [N, I/N, O/N], in two products.

    The rule acts on whichever side is narrower.
    """
    N, rows, columns = weight.shape
    if rows > columns:
        u = weight.transpose(1, 2).reshape(N * columns, rows) @ x.reshape(-1, rows).t()
        z = u.view(N, -1, N).bmm(rule).sum(0)  # [(l, T), c]
        out = z.view(columns, -1, N).permute(1, 2, 0)
    else:
        u = x.reshape(-1, N, rows).permute(2, 0, 1).reshape(-1, N)  # [(j, T), a]
        z = u @ rule.transpose(0, 1).reshape(N, N * N)  # [(j, T), (n, c)]
        z = z.view(rows, -1, N, N).permute(2, 0, 1, 3).reshape(N * rows, -1)  # [(n, j), (T, c)]
        out = z.t() @ weight.reshape(N * rows, columns)
    return out.reshape(*x.shape[:-1], -1)
