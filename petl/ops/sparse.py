"""Linear layers with a sparse update: a frozen weight plus values at few positions.

Shapes: O out, I in, T tokens; the weight is stored as [P, Q], that is [O, I], or [I, O] if
`transposed`. K positions are flat (`row * Q + column`), ascending and distinct, int32 or int64.
"""

import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petl.ops import Ctx

Products = Callable[[Tensor, Tensor], Tensor]

BLOCK = 2**19  # elements of a block of rows, unless there would be more than MAX_BLOCKS
MAX_BLOCKS = 16
# Up to this fraction of positions, sampled products are faster than dense blocks and a gather, by
# device and half precision. Measured on a CPU (float32 0.25, bfloat16 0.04); assumption for CUDA,
# where half precision has tensor cores.
SAMPLED_BELOW = {("cpu", False): 0.2, ("cpu", True): 0.03, ("cuda", False): 0.02}

# rows per call of a sampled product, of which transposed copies are made: they should fit a cache
SAMPLED_ROWS = 256

# PyTorch's library of vectorized kernels for x86
HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines

_writing = threading.Lock()  # during a product, the weight has other values


class Support(NamedTuple):
    """Positions of values in a stored weight, `index` [K], and True if it is stored as [I, O]."""

    index: Tensor
    transposed: bool = False


# The product with the changed weight


@contextmanager
def written(weight: Tensor, index: Tensor, values: Tensor, dtype: torch.dtype) -> Generator[Tensor]:
    """Yield the stored weight [P, Q] plus `values` at `index`, in `dtype`, for the block.

    Sums are computed in float32 and rounded once. If possible they are written into the weight
    itself, whose own values are restored at the end, bit-exact; else into a copy.
    """
    at = index.long()
    if weight.dtype == dtype and _is_writable(weight):
        # `data` bypasses autograd's version counter: the weight is restored before backward
        flat = weight.data.view(-1)
        with _writing:
            original = flat.index_select(0, at)
            try:
                yield flat.index_copy_(0, at, (original + values).to(dtype)).view(weight.shape)
            finally:
                flat.index_copy_(0, at, original)
        return
    copy = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    sums = weight.detach().reshape(-1).index_select(0, at) + values
    yield copy.view(-1).index_copy_(0, at, sums.to(dtype)).view(weight.shape)


def _is_writable(weight: Tensor) -> bool:
    """Return True if `weight` may be changed for a moment: a dense tensor of this process alone."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and not torch.jit.is_tracing()  # a trace writes through `data`, but may not restore
        and weight.is_contiguous()
        and (weight.device.type != "cpu" or not weight.is_shared())
        and (not weight.is_inference() or torch.is_inference_mode_enabled())
    )


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    support: Support,
    products: Products | None = None,
) -> Tensor:
    """Return `x (W + D)^T + bias`, [..., O], for x [..., I] and D = `values` [K] at the support.

    Gradients go to x and to the values; weight and bias get none.

    Args:
        x: [..., I].
        weight: W as stored.
        bias: [O] or None.
        values: [K].
        support: their positions.
        products: called once in backward with left [T, P] and right [T, Q], returns `left^T right`
            at the support; None: `products_at`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
        return _SparseLinear.apply(x, values, weight, bias, support, products)
    return linear_forward(x, weight, bias, values, support)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, support: Support
) -> Tensor:
    """Return `x (W + D)^T + bias`, [..., O], in the dtype of x."""
    with written(weight, support.index, values, x.dtype) as w:
        bias = None if bias is None else bias.to(x.dtype)
        return nn.functional.linear(x, w.t() if support.transposed else w, bias)


def input_gradient(grad: Tensor, weight: Tensor, values: Tensor, support: Support) -> Tensor:
    """Return `grad (W + D)`, [..., I], for grad [..., O]."""
    with written(weight, support.index, values, grad.dtype) as w:
        return grad @ (w.t() if support.transposed else w)


def values_gradient(
    grad: Tensor, x: Tensor, support: Support, products: Products | None = None
) -> Tensor:
    """Return the gradient of the weight at the support, [K], for grad [..., O] and x [..., I]."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    left, right = (x, grad) if support.transposed else (grad, x)
    return products(left, right) if products else products_at(left, right, support.index)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        support: Support,
        products: Products | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values, weight)
        # not in save_for_backward, which checks versions: DDP rewrites buffers before each forward
        ctx.support, ctx.products = support, products
        # no view, as in `_LowRankLinear`
        return linear_forward(x, weight, bias, values, support).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight = ctx.saved_tensors
        to_x = to_values = None
        if ctx.needs_input_grad[0]:
            to_x = input_gradient(grad, weight, values, ctx.support)
        if ctx.needs_input_grad[1]:
            to_values = values_gradient(grad, x, ctx.support, ctx.products).to(values.dtype)
        return to_x, to_values, None, None, None, None


# The update added to the output of a base layer that is not a plain matrix


def add_sparse(
    y: Tensor, x: Tensor, values: Tensor, support: Support, products: Products | None = None
) -> Tensor:
    """Return `y + x D^T`, [..., O], for the base layer's output y; others as in `sparse_linear`."""
    return _AddSparse.apply(y, x, values, support, products)


class _AddSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx, y: Tensor, x: Tensor, values: Tensor, support: Support, products: Products | None
    ) -> Tensor:
        # y is not needed: it only passes its gradient on
        ctx.save_for_backward(x, values)
        ctx.support, ctx.products = support, products
        return y + times(x, values, support, y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        to_x = to_values = None
        if ctx.needs_input_grad[1]:
            swapped = ctx.support._replace(transposed=not ctx.support.transposed)
            to_x = times(grad, values, swapped, x.shape[-1])
        if ctx.needs_input_grad[2]:
            to_values = values_gradient(grad, x, ctx.support, ctx.products).to(values.dtype)
        return grad, to_x, to_values, None, None


def times(x: Tensor, values: Tensor, support: Support, width: int) -> Tensor:
    """Return `x S^T`, or `x S` if transposed, [..., width], with `values` [K] at S's support."""
    index, transposed = support
    flat = x.reshape(-1, x.shape[-1])
    P, Q = (flat.shape[1], width) if transposed else (width, flat.shape[1])
    if _sampling_pays(x, index, P * Q):
        # sparse kernels do not support half precision
        dtype = torch.promote_types(x.dtype, torch.float32)
        csr = _csr(index, values.to(dtype), P, Q)
        # a CSR product needs the sparse factor on the left
        csr = csr.t().to_sparse_csr() if transposed else csr
        with torch.autocast(x.device.type, enabled=False):  # which would choose half precision
            product = csr @ flat.to(dtype).t()
        return product.t().to(x.dtype).reshape(*x.shape[:-1], width)
    out = flat.new_zeros(len(flat), width)
    for start, stop in row_blocks(P, Q):
        local, inside = _in_block(index, start * Q, stop * Q)
        entries = torch.where(inside, values, 0).to(x.dtype)  # entries outside the block add 0
        block = entries.new_zeros((stop - start) * Q).index_add_(0, local, entries).view(-1, Q)
        if transposed:
            out += flat[:, start:stop] @ block
        else:
            out[:, start:stop] = flat @ block.t()
    return out.view(*x.shape[:-1], width)


# Products at chosen positions


def products_at(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """Return `left^T right` at `index`, [K], in float32 or finer, for left [T, P], right [T, Q].

    Computed as sampled inner products where these are faster, else block by block of rows; the
    full [P, Q] is never in memory.
    """
    P, Q = left.shape[1], right.shape[1]
    dtype = torch.promote_types(left.dtype, torch.float32)
    if _sampling_pays(left, index, P * Q):
        sums = _csr(index, left.new_zeros(len(index), dtype=dtype), P, Q)
        for l, r in zip(left.split(SAMPLED_ROWS), right.split(SAMPLED_ROWS), strict=True):
            # inner products of columns: a CPU needs both factors transposed in memory
            l, r = _transposed(l.to(dtype)), _transposed(r.to(dtype))
            sums = torch.sparse.sampled_addmm(sums, l, r.t())
        return sums.values()
    out = left.new_zeros(len(index), dtype=dtype)
    for start, stop in row_blocks(P, Q):
        local, inside = _in_block(index, start * Q, stop * Q)
        block = (left[:, start:stop].t() @ right).view(-1)
        out = torch.where(inside, block.index_select(0, local).to(dtype), out)
    return out


def _transposed(x: Tensor) -> Tensor:
    """Return `x^T`, [I, T], for x [T, I]; contiguous on a CPU.

    A shuffle of T groups of I channels is a transposition. Its kernel for channels-last memory uses
    vector instructions, unlike that of a copy: it takes 0.2 to 0.5 of the time (measured).
    """
    T, I = x.shape
    if x.device.type != "cpu" or T == 0 or not HAS_FBGEMM:
        return x.t()
    pixel = x.reshape(1, 1, 1, T * I).permute(0, 3, 1, 2)
    return nn.functional.channel_shuffle(pixel, T).view(I, T)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left^T right` to `total` [P, Q], for left [T, P], right [T, Q], block by block."""
    for start, stop in row_blocks(*total.shape):
        total[start:stop] += left[:, start:stop].t() @ right


def largest_entries(matrix: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the `count` positions where `|matrix|` [P, Q] is largest, ascending, in `dtype`."""
    blocks = (matrix[start:stop].abs() for start, stop in row_blocks(*matrix.shape))
    return _largest(blocks, count, dtype)


def largest_products(
    left: Tensor,
    right: Tensor,
    count: int,
    dtype: torch.dtype,
    reduce: Callable[[Tensor], Tensor] = lambda block: block,
) -> Tensor:
    """Return the `count` positions where `|left^T right|` is largest, ascending, in `dtype`.

    One block of rows of the product is in memory at a time.

    Args:
        left: [T, P].
        right: [T, Q].
        count: number of positions.
        dtype: of the positions.
        reduce: sums a block over processes.
    """
    spans = row_blocks(left.shape[1], right.shape[1])
    blocks = (reduce(left[:, start:stop].t() @ right).abs_() for start, stop in spans)
    return _largest(blocks, count, dtype)


def _largest(blocks: Iterable[Tensor], count: int, dtype: torch.dtype) -> Tensor:
    """Return the positions of the largest values in the matrix of these blocks of rows."""
    best = where = torch.empty(0)
    begin = 0
    for block in blocks:
        size, local = block.view(-1).topk(min(count, block.numel()))
        local, begin = (local + begin).to(dtype), begin + block.numel()
        del block  # before the next one is computed
        # the best of this block, merged with the best so far
        best, where = torch.cat([best.to(size), size]), torch.cat([where.to(local), local])
        best, order = best.topk(min(count, len(best)))
        where = where[order]
    return where.sort().values


def row_blocks(P: int, Q: int) -> Iterator[tuple[int, int]]:
    """Yield first row and end of each block of rows of a [P, Q] matrix."""
    count = max(1, min(MAX_BLOCKS, P, -(-P * Q // BLOCK)))
    rows = -(-P // count)
    return ((start, min(start + rows, P)) for start in range(0, P, rows))


def _in_block(index: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return positions relative to `start`, and a mask of those in [start, stop).

    Positions outside are clamped into the block instead of removed: a selection has a size that
    depends on values, which forces a synchronization with the device.
    """
    return (index - start).clamp(0, stop - start - 1).long(), (index >= start) & (index < stop)


def _sampling_pays(x: Tensor, index: Tensor, size: int) -> bool:
    """Return True if sampled products are faster, see `SAMPLED_BELOW`."""
    if type(x) not in (Tensor, nn.Parameter):  # such as the FakeTensor of a dry run
        return False
    half = x.dtype in (torch.float16, torch.bfloat16)
    # 0.0: other devices lack these kernels
    return 0 < len(index) <= SAMPLED_BELOW.get((x.device.type, half), 0.0) * size


def _csr(index: Tensor, values: Tensor, P: int, Q: int) -> Tensor:
    """Return the [P, Q] matrix with `values` at `index`, in CSR format."""
    _warm_up()
    ends = torch.arange(0, (P + 1) * Q, Q, dtype=index.dtype, device=index.device)
    rows = torch.searchsorted(index, ends, out_int32=index.dtype == torch.int32)
    return torch.sparse_csr_tensor(rows, index % Q, values, (P, Q), check_invariants=False)


@cache
def _warm_up() -> None:
    """Trigger, and suppress, PyTorch's one-time warning that CSR tensors are a beta feature."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.eye(1).to_sparse_csr()
