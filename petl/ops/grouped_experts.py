"""Products of rows with the weight of their expert, and with a low-rank update of it.

Shapes: E experts, S rows (a token once for each of its experts), I in, O out, R rank. The update
B A of an expert [O, I] is never formed, nor a copy of the stack of weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from petl.ops import Ctx
from petl.ops.dropout import keep_mask

ALIGNED = 16  # bytes, of the rows of matrices that torch's grouped product takes


@dataclass(eq=False)
class StackedFactors:
    """Updates `scale * B[e] A[e]` of the weights of E experts.

    Attributes:
        A: [E, R, I].
        B: [E, O, R].
        scale: of all updates.
        dropout: probability with which entries of the input are dropped before A, in [0, 1).
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0

    @classmethod
    def joined(cls, updates: Sequence["StackedFactors"]) -> "StackedFactors":
        """Return the sum of several updates; entries of x are dropped as for the first of them."""
        if len(updates) == 1:
            return updates[0]
        # a sum of products is one product of a larger rank
        A = torch.cat([each.A for each in updates], dim=1)
        B = torch.cat([each.scale * each.B for each in updates], dim=2)
        return cls(A, B, 1.0, updates[0].dropout)


@dataclass(eq=False)
class ExpertRows:
    """Which expert each row belongs to.

    Attributes:
        experts: [S], the expert of each row; of none, from `count` on.
        count: the number of experts.
        offsets: [E] int32, where the rows of each expert end: rows are sorted by expert, those of
            none last. None: rows have any order, and each is multiplied by a copy of its weight.
        has_rest: True if there may be rows of no expert; their products are 0.
        tokens: [S], the token of each row, of `total`; None: not known.
        total: the number of tokens.
    """

    experts: Tensor
    count: int
    offsets: Tensor | None
    has_rest: bool = False
    tokens: Tensor | None = None
    total: int = 0

    @classmethod
    def ordered(cls, experts: Tensor, count: int, *, has_rest: bool = False) -> "ExpertRows":
        """Return the rows of an input that is sorted by expert, `experts` [S]."""
        bounds = torch.arange(count, device=experts.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, bounds, right=True, out_int32=True)
        return cls(experts, count, offsets, has_rest)

    @classmethod
    def of_sizes(cls, sizes: list[int]) -> "ExpertRows":
        """Return the rows of an input that is sorted by expert, by the number of rows of each."""
        counts = torch.tensor(sizes)
        experts = torch.arange(len(sizes)).repeat_interleave(counts, output_size=sum(sizes))
        return cls(experts, len(sizes), counts.cumsum(0, dtype=torch.int32))

    @cached_property
    def ends(self) -> list[int]:
        """Where the rows of each expert end; on shapes alone, as if all experts had as many."""
        assert self.offsets is not None
        if self.offsets.is_meta or isinstance(self.offsets, FakeTensor):
            return [len(self.experts) * (e + 1) // self.count for e in range(self.count)]
        return self.offsets.tolist()

    def ranges(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has rows, with its rows; they are sorted."""
        start = 0
        for expert, end in enumerate(self.ends):
            if end > start:
                yield expert, slice(start, end)
            start = end

    @property  # not cached, which torch.compile does not take
    def rest(self) -> Tensor | None:
        """[S, 1], True for rows of no expert; None if there are none."""
        return (self.experts >= self.count).unsqueeze(-1) if self.has_rest else None

    @property
    def indices(self) -> Tensor:
        """[S], the expert of each row; of the last one for rows of none."""
        return self.experts.clamp(max=self.count - 1) if self.has_rest else self.experts


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    rows: ExpertRows,
    bias: Tensor | None = None,
    update: StackedFactors | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return `x W[e]^T + bias[e] + scale * (drop(x) A[e]^T) B[e]^T` for each row's expert e.

    On a CPU it is one autograd function, which saves x and x A^T only. Gradients go to x, A and B,
    and are zero for experts without rows; on other devices and under torch.compile, and if weight
    or bias are trained, it is composed of torch's products.

    Args:
        x: [S, I], of any floating dtype; products are computed in that of the weight.
        weight: [E, O, I], or more experts.
        rows: the expert of each row.
        bias: [E, O].
        update: of the weights; of as many experts as these.
        transposed: the weight is stored as [E, I, O].

    Returns:
        [S, O], in the dtype of the weight.
    """
    # as transformers does, also under autocast, which would cast the whole stack
    x = x.to(weight.dtype)
    weight = (weight.mT if transposed else weight)[: rows.count]
    bias = None if bias is None else bias[: rows.count]
    if update is None:  # of rank 0
        A, B = weight.new_empty(rows.count, 0, x.shape[1]), weight.new_empty(*weight.shape[:2], 0)
        update = StackedFactors(A, B, 1.0)
    factors = _Factors.of(update, rows.count, x)
    # all factors have the dtype of x from here on
    with torch.autocast(x.device.type, enabled=False):
        if rows.offsets is None:
            return _gathered(x, weight, rows, bias, factors)
        # the functions of this module give the weight no gradient
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        A, B, mask, scale = factors
        if torch.compiler.is_compiling():
            # torch compiles its grouped product in this dtype only
            if not trained and x.dtype != torch.bfloat16:
                y, _ = _compiled(x, A, B, mask, weight, rows.offsets, scale)
                return y if bias is None else y + bias[rows.indices]
        elif not trained and (x.device.type in ("cpu", "meta") or isinstance(x, FakeTensor)):
            return _GroupedLinear.apply(x, A, B, (weight, bias, mask), rows, scale)
        return _composed(x, weight, rows, bias, factors)


class _Factors(NamedTuple):
    """Factors of as many experts as rows are for, and the mask of dropout for their input."""

    A: Tensor
    B: Tensor
    mask: Tensor | None
    scale: float

    @classmethod
    def of(cls, update: StackedFactors, experts: int, x: Tensor) -> "_Factors":
        """Draw the mask for x [S, I]."""
        A, B = update.A[:experts], update.B[:experts]
        if not update.dropout:
            return cls(A, B, None, update.scale)
        mask, mean = keep_mask(x, update.dropout)
        return cls(A, B, mask, update.scale / mean)


class _GroupedLinear(torch.autograd.Function):
    """The product and its update, expert by expert, into slices of one result."""

    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        frozen: tuple[Tensor, Tensor | None, Tensor | None],
        rows: ExpertRows,
        scale: float,
    ) -> Tensor:
        weight, bias, mask = frozen
        y, h = _multiply(x, _Factors(A, B, mask, scale), weight, bias, rows.ends)
        ctx.save_for_backward(x, A, B, mask, weight, h)
        ctx.rows, ctx.scale = rows, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, mask, weight, h = ctx.saved_tensors
        factors = _Factors(A, B, mask, ctx.scale)
        needs_x = ctx.needs_input_grad[0]  # False in the first layer
        # the caller of `backward` may have it enabled
        with torch.autocast(x.device.type, enabled=False):
            gradients = _gradients(grad, x, factors, weight, h, ctx.rows.ends, needs_x=needs_x)
        return *gradients, None, None, None


def _multiply(
    x: Tensor, factors: _Factors, weight: Tensor, bias: Tensor | None, ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the product with its update, [S, O], and `drop(x) A^T`, [S, R]."""
    A, B, mask, scale = factors
    y, h = x.new_empty(len(x), weight.shape[1]), x.new_empty(len(x), A.shape[1])
    dropped = x if mask is None else x * mask
    stacks = (weight.mT, _contiguous(A, x).mT, _contiguous(B, x).mT)
    for e, W, a, b, x_e, dropped_e, h_e, y_e in _of_each(ends, stacks, (x, dropped, h, y)):
        torch.mm(x_e, W, out=y_e)
        if bias is not None:
            y_e += bias[e]
        torch.mm(dropped_e, a, out=h_e)
        y_e.addmm_(h_e, b, alpha=scale)
    # rows of no expert, which no product has written
    y[ends[-1] :] = 0
    return y, h


def _gradients(
    grad: Tensor,
    x: Tensor,
    factors: _Factors,
    weight: Tensor,
    h: Tensor,
    ends: Sequence[int],
    *,
    needs_x: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, which is undefined unless `needs_x`, A and B."""
    A, B, mask, scale = factors
    # copied again, which takes less than to keep the copies
    stack_a, stack_b = _contiguous(A, x), _contiguous(B, x)
    to_x = torch.empty_like(x)
    # zero where an expert has no rows: without a gradient, processes would wait for one another
    to_a, to_b = torch.zeros_like(stack_a), torch.zeros_like(stack_b)
    dropped = x if mask is None else x * mask
    stacks = (weight, stack_a, stack_b, to_a, to_b)
    tensors = (grad, dropped, h, to_x, x if mask is None else mask)
    for _, W, a, b, to_a_e, to_b_e, *own in _of_each(ends, stacks, tensors):
        g, dropped_e, h_e, to_x_e, mask_e = own
        u = torch.mm(g, b).mul_(scale)
        torch.mm(u.t(), dropped_e, out=to_a_e)
        torch.mm(g.t(), h_e, out=to_b_e)
        if not needs_x:
            continue
        torch.mm(g, W, out=to_x_e)
        if mask is None:
            to_x_e.addmm_(u, a)
        else:
            to_x_e += torch.mm(u, a).mul_(mask_e)
    # of empty memory, and added up over the experts of a token
    to_x[ends[-1] :] = 0
    return to_x, to_a.to(A.dtype), to_b.mul_(scale).to(B.dtype)


def _of_each(
    ends: Sequence[int], stacks: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Iterator[tuple[Any, ...]]:
    """Yield each expert that has rows, its entries of the stacks, and its rows of the tensors.

    Views of all experts are made together, which takes a fifth of the time of slicing.
    """
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    sizes.append(len(tensors[0]) - ends[-1])
    rows = zip(*(tensor.split(sizes) for tensor in tensors), strict=True)
    each = zip(*(stack.unbind() for stack in stacks), strict=True)
    for expert, (size, own, parts) in enumerate(zip(sizes, each, rows, strict=False)):
        if size:
            yield expert, *own, *parts


# Under torch.compile, whose graph cannot depend on the number of rows of an expert


@torch.library.custom_op("petl::grouped_experts", mutates_args=())
def _compiled(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _multiply(x, _Factors(A, B, mask, scale), weight, None, offsets.tolist())


@torch.library.custom_op("petl::grouped_experts_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, A, B, weight, h, offsets = tensors
    return _gradients(grad, x, _Factors(A, B, mask, scale), weight, h, offsets.tolist())


@_compiled.register_fake
def _(
    x: Tensor, A: Tensor, _: Tensor, __: Tensor | None, weight: Tensor, *___: object
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), weight.shape[1]), x.new_empty(len(x), A.shape[1])


@_compiled_backward.register_fake
def _(_: Tensor, tensors: Sequence[Tensor], *__: object) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in tensors[:3])


def _keep(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, mask, weight, offsets, ctx.scale = inputs
    ctx.save_for_backward(x, A, B, weight, output[1], offsets, mask)


def _differentiate(ctx: Ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, mask = ctx.saved_tensors
    gradients = _compiled_backward(grad, tensors, mask, ctx.scale)
    return *gradients, None, None, None, None


_compiled.register_autograd(_differentiate, setup_context=_keep)


def _contiguous(factor: Tensor, x: Tensor) -> Tensor:
    return factor.to(x.dtype).contiguous()


def _composed(
    x: Tensor, weight: Tensor, rows: ExpertRows, bias: Tensor | None, factors: _Factors
) -> Tensor:
    """The product of sorted rows, by torch's grouped products; they leave the rest undefined."""
    # for the backward pass, in which their gradients are undefined as well
    if rows.rest is not None:
        x = x.masked_fill(rows.rest, 0.0)
    y = F.grouped_mm(x, weight.mT, offs=rows.offsets)
    if bias is not None:
        y = y + bias[rows.indices]
    # of rank 0 there is no update
    if factors.A.shape[1]:
        lacking = -factors.A.shape[1] % (ALIGNED // x.element_size())
        A, B = F.pad(factors.A, (0, 0, 0, lacking)), F.pad(factors.B, (0, lacking))
        dropped = x if factors.mask is None else x * factors.mask
        h = F.grouped_mm(dropped, _contiguous(A, x).mT, offs=rows.offsets)
        y = y + F.grouped_mm(factors.scale * h, _contiguous(B, x).mT, offs=rows.offsets)
    return y if rows.rest is None else y.masked_fill(rows.rest, 0.0)


def _gathered(
    x: Tensor, weight: Tensor, rows: ExpertRows, bias: Tensor | None, factors: _Factors
) -> Tensor:
    """The product of rows in any order, each with its own copy of a weight."""
    # no sort, and no shape that depends on values: for graphs of a device
    index = rows.indices
    dropped = x if factors.mask is None else x * factors.mask
    h = torch.bmm(factors.A[index].to(x.dtype), dropped.unsqueeze(-1))
    y = torch.bmm(weight[index], x.unsqueeze(-1))
    y = torch.baddbmm(y, factors.B[index].to(x.dtype), h, alpha=factors.scale).squeeze(-1)
    if bias is not None:
        y = y + bias[index]
    return y if rows.rest is None else y.masked_fill(rows.rest, 0.0)
