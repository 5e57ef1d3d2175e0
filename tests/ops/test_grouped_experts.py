"""Products of rows with the weight of their expert equal the dense equation, in every way."""

import pytest
import torch
from torch import Tensor

from petl.ops.dropout import keep_mask
from petl.ops.grouped_experts import ExpertRows, StackedFactors, grouped_linear

E, I, O, R = 5, 24, 32, 4
SIZES = [3, 0, 7, 1, 2]  # rows of each expert
REST = 2  # rows of no expert
SCALE = 1.5


def rows_of(way: str) -> ExpertRows:
    experts = torch.arange(E + 1).repeat_interleave(torch.tensor([*SIZES, REST]))
    if way != "gathered":
        return ExpertRows.ordered(experts, E, has_rest=True)
    order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(1))
    return ExpertRows(experts[order], E, None, has_rest=True)


def dense(x: Tensor, dropped: Tensor, tensors: list[Tensor], experts: Tensor) -> Tensor:
    """The equation, row by row, in float64."""
    W, A, B, bias = tensors
    y = [
        x[i] @ W[e].t() + SCALE * (dropped[i] @ A[e].t()) @ B[e].t() + bias[e]
        if e < E
        else torch.zeros(O, dtype=x.dtype)
        for i, e in enumerate(experts.tolist())
    ]
    return torch.stack(y)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("way", ["function", "composed", "gathered"])
def test_outputs_and_gradients_equal_the_dense_equation(way, transposed, dropout):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(SIZES) + REST, I), (E, O, I), (E, R, I), (E, O, R), (E, O)]
    x, W, A, B, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    weight = W.mT.contiguous() if transposed else W
    weight.requires_grad_(way == "composed")  # of the base, it leads there on a CPU
    rows = rows_of(way)
    torch.manual_seed(2)
    y = grouped_linear(
        x, weight, rows, bias, StackedFactors(A, B, SCALE, dropout), transposed=transposed
    )
    given = torch.randn(y.shape, generator=generator)
    (y * given).sum().backward()

    exact = [each.detach().double().requires_grad_() for each in (x, A, B)]
    mask = 1.0
    if dropout:
        torch.manual_seed(2)
        kept, mean = keep_mask(x, dropout)
        mask = kept / mean
    tensors = [W.detach().double(), exact[1], exact[2], bias.double()]
    expected = dense(exact[0], exact[0] * mask, tensors, rows.experts)
    (expected * given).sum().backward()
    assert error(y.detach(), expected.detach()) < 5e-7
    for tensor, same in zip((x, A, B), exact, strict=True):
        assert error(tensor.grad, same.grad) < 7e-7
    for factor in (A, B):
        assert (factor.grad[1] == 0).all()  # no rows: zero, not None
    assert (x.grad[rows.experts == E] == 0).all()


def error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).abs().max() / exact.abs().max())


def test_half_precision_computes_in_that_of_the_weight_with_float32_factors():
    x, W = torch.randn(13, I).bfloat16().requires_grad_(), torch.randn(E, O, I).bfloat16()
    A, B = torch.randn(E, R, I, requires_grad=True), torch.randn(E, O, R, requires_grad=True)
    y = grouped_linear(x, W, ExpertRows.of_sizes(SIZES), update=StackedFactors(A, B, 1.0))
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert A.grad.dtype == B.grad.dtype == torch.float32


def test_several_updates_are_summed_and_rows_of_fewer_experts_take_the_first():
    x, W = torch.randn(6, I), torch.randn(E, O, I)
    factors = [StackedFactors(torch.randn(E, r, I), torch.randn(E, O, r), r / 4) for r in (2, 5)]
    rows = ExpertRows.of_sizes([2, 4])
    y = grouped_linear(x, W, rows, update=StackedFactors.joined(factors))
    W += sum(each.scale * each.B @ each.A for each in factors)
    torch.testing.assert_close(y, grouped_linear(x, W, rows), rtol=1e-4, atol=1e-4)


def test_memory_of_a_pass_is_that_of_its_rows():
    E = 64
    x, W = torch.randn(8, 64, requires_grad=True), torch.randn(E, 64, 64)
    update = StackedFactors(
        torch.randn(E, 1, 64, requires_grad=True), torch.zeros(E, 64, 1, requires_grad=True), 1.0
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        grouped_linear(
            x, W, ExpertRows.of_sizes([8, *[0] * (E - 1)]), update=update
        ).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < W.nbytes / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["sorted", "gathered"])
def test_compiles_as_one_graph_with_the_same_gradients(way, dtype):
    experts = torch.arange(E).repeat_interleave(torch.tensor(SIZES))
    x, W = torch.randn(13, I, dtype=dtype, requires_grad=True), torch.randn(E, O, I, dtype=dtype)
    A, B = torch.randn(E, R, I, requires_grad=True), torch.randn(E, O, R, requires_grad=True)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        is_sorted = way == "sorted"
        rows = ExpertRows.ordered(experts, E) if is_sorted else ExpertRows(experts, E, None)
        return grouped_linear(x, W, rows, update=StackedFactors(A, B, SCALE)).float().square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    given = (x, A, B)
    for y, expected in zip(
        torch.autograd.grad(compiled(*given), given),
        torch.autograd.grad(run(*given), given),
        strict=True,
    ):
        assert error(y, expected) < (0.02 if dtype == torch.bfloat16 else 1e-6)
