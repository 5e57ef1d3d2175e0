"""Low-rank products, compared with the dense update in float64."""

import gc
import weakref

import pytest
import torch
from bench.counters import Kernels, kept_bytes
from torch import nn
from transformers.pytorch_utils import Conv1D

from petl.ops import low_rank
from petl.ops.dropout import keep_mask
from petl.ops.low_rank import (
    LowRankRows,
    add_low_rank,
    add_up,
    cast_for_product,
    linear_with_low_rank,
    low_rank_linear,
    project_down,
)

I, O, R = 6, 5, 3


def pieces(dtype: torch.dtype = torch.float32):
    x, y = torch.randn(2, 4, I, dtype=dtype), torch.randn(2, 4, O, dtype=dtype)
    return x, y, torch.randn(R, I, requires_grad=True), torch.randn(O, R, requires_grad=True)


def test_project_down_gives_one_row_for_each_token():
    x, _, A, _ = pieces()
    h = project_down(x, A)
    assert h.shape == (8, R)
    torch.testing.assert_close(h[5], A @ x[1, 1])


def test_add_up_adds_to_the_base_output():
    _, y, _, B = pieces()
    h = torch.randn(8, R)
    found = add_up(y, h, B, 0.5)
    assert found.shape == y.shape
    torch.testing.assert_close(found[1, 1], y[1, 1] + 0.5 * (B @ h[5]))


def test_add_low_rank_equals_the_dense_update_with_its_gradients():
    x, y, A, B = pieces()
    weight = torch.randn_like(y)
    (add_low_rank(y, x, A, B, 0.7) * weight).sum().backward()
    A64, B64 = (t.detach().double().requires_grad_() for t in (A, B))
    dense = y.double() + 0.7 * x.double() @ (B64 @ A64).T
    (dense * weight.double()).sum().backward()
    torch.testing.assert_close(add_low_rank(y, x, A, B, 0.7).double(), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(A.grad.double(), A64.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(B.grad.double(), B64.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_have_the_precision_of_the_activations(dtype):
    x, y, A, B = pieces(dtype)
    found = add_low_rank(y, x, A, B, 1.0)
    assert found.dtype == dtype
    found.float().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    expected = y.float() + x.float() @ (B @ A).T
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)


def test_a_float32_input_may_meet_a_half_precision_output():
    """As under autocast, where a layer norm returns float32 and a linear layer bfloat16."""
    x, y, A, B = pieces()
    assert add_low_rank(y.bfloat16(), x, A, B, 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_under_autocast_have_the_dtype_of_torchs_own(dtype):
    x, W = torch.randn(3, I, dtype=dtype), torch.randn(O, I, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank.product_dtype(x) == nn.functional.linear(x, W).dtype


def test_an_output_that_is_a_view_is_unchanged():
    x, _, A, B = pieces()
    whole = torch.randn(2, 4, 2 * O)
    before = whole.clone()
    add_low_rank(whole[..., :O], x, A, B, 1.0)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("base", [nn.Linear(I, O), Conv1D(O, I)])
def test_a_layer_is_called_with_another_weight_however_it_stores_its_own(base):
    x, _, A, B = pieces()
    W = (B @ A).detach()  # [O, I]
    torch.testing.assert_close(low_rank.call_with_weight(base, W, x), x @ W.T + base.bias)


# The frozen layer and the update in one function


def test_a_layer_that_trains_is_not_taken_for_a_frozen_one():
    x, _, A, B = pieces()
    base = nn.Linear(I, O).requires_grad_(False)
    assert low_rank.linear_with_low_rank(x, base, A, B, 1.0) is not None
    base.bias.requires_grad_()
    assert low_rank.linear_with_low_rank(x, base, A, B, 1.0) is None


def layer(rows=O, columns=I, dtype=torch.float64):
    """Return x [2, 4, I], A and B with gradients, and a frozen weight and bias."""
    shapes = ((2, 4, columns), (R, columns), (rows, R))
    leaves = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    return *leaves, torch.randn(rows, columns, dtype=dtype), torch.randn(rows, dtype=dtype)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_low_rank_linear_layer_equals_the_dense_one(with_bias):
    x, A, B, W, bias = layer()
    bias = bias if with_bias else None
    found = low_rank_linear(x, (W, bias), A, B, 0.7)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, W + 0.7 * B @ A, bias))


@pytest.mark.parametrize("rows", [O, I])  # a square weight hides a gradient given to a wrong input
def test_gradients_and_second_derivatives_are_exact(rows):
    x, A, B, W, bias = layer(rows)

    def function(x, A, B):
        return low_rank_linear(x, (W, bias), A, B, 0.7)

    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


def test_gates_multiply_the_rows_of_their_expert():
    x, _, _, W, bias = layer()
    E, r = 3, 2
    A = torch.randn(E * r, I, dtype=torch.float64, requires_grad=True)
    B = torch.randn(O, E * r, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(8, E, dtype=torch.float64, requires_grad=True)

    def function(x, A, B, gate):
        return low_rank_linear(x, (W, bias), A, B, 0.7, gate=gate)

    expected = torch.nn.functional.linear(x, W, bias).flatten(0, 1)
    for e in range(E):
        delta = B[:, e * r : (e + 1) * r] @ A[e * r : (e + 1) * r]
        expected = expected + 0.7 * gate[:, e : e + 1] * (x.flatten(0, 1) @ delta.t())
    torch.testing.assert_close(function(x, A, B, gate).flatten(0, 1), expected)
    assert torch.autograd.gradcheck(function, (x, A, B, gate))
    assert torch.autograd.gradgradcheck(function, (x, A, B, gate))


@pytest.mark.parametrize("shape", [(0, I), (2, 0, I)])
@pytest.mark.parametrize("experts", [None, R])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_empty_input_gives_an_empty_output_and_zero_gradients(shape, experts, dropout):
    """Such as for an expert that no token of a batch chose."""
    _, A, B, W, bias = layer()
    x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    gate = None
    if experts is not None:
        gate = torch.empty(0, experts, dtype=torch.float64, requires_grad=True)
    found = low_rank_linear(x, (W, bias), A, B, 0.7, gate=gate, dropout=dropout)
    assert found.shape == (*shape[:-1], O)
    found.sum().backward()
    assert x.grad.shape == shape
    assert gate is None or gate.grad.shape == gate.shape
    assert torch.equal(A.grad, torch.zeros_like(A))
    assert torch.equal(B.grad, torch.zeros_like(B))


def test_dropout_uses_one_mask_for_the_output_and_the_gradients(monkeypatch):
    x, A, B, W, bias = layer()
    mask = (torch.rand(x.shape) < 0.5).to(torch.uint8)
    monkeypatch.setattr(low_rank, "keep_mask", lambda x, p: (mask, 0.5))

    def function(x, A, B):
        return low_rank_linear(x, (W, bias), A, B, 0.7, dropout=0.3)

    expected = torch.nn.functional.linear(x, W, bias) + 0.7 * (x * mask / 0.5) @ (B @ A).t()
    torch.testing.assert_close(function(x, A, B), expected)
    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999, 0.0001])
def test_a_mask_keeps_the_fraction_that_it_returns(p):
    mask, mean = keep_mask(torch.empty(1000, 999), p)
    assert mask.dtype == torch.uint8
    assert mask.shape == (1000, 999)
    assert set(mask.unique().tolist()) <= {0, 1}
    assert abs(mean - (1 - p)) <= 1 / 256
    assert abs(float(mask.float().mean()) - mean) < 0.002


def test_bytes_of_a_mask_are_independent():
    """Each of the eight bytes of a word must be as likely to be dropped as the others."""
    mask, mean = keep_mask(torch.empty(80_000), 0.5)
    shares = mask.view(-1, 8).float().mean(0)
    assert float((shares - mean).abs().max()) < 0.02


def test_half_precision_products_give_float32_gradients():
    x, A, B, W, bias = layer(dtype=torch.float32)
    low = low_rank_linear(x.bfloat16(), (W.bfloat16(), bias.bfloat16()), A, B, 0.7)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    expected = torch.nn.functional.linear(x, W + 0.7 * B @ A, bias)
    torch.testing.assert_close(low.float(), expected, atol=0.2, rtol=0.05)


def test_six_kernels_are_added_and_the_input_is_saved_once():
    x, A, B, W, bias = layer(dtype=torch.float32)

    def step():
        low_rank_linear(x, (W, bias), A, B, 0.7).backward(torch.ones(2, 4, O))

    def frozen():
        torch.nn.functional.linear(x, W, bias).backward(torch.ones(2, 4, O))

    counts = []
    for function in (step, frozen):
        function()  # gradients are there: what adds them up is counted for both
        for leaf in (x, A, B):
            leaf.grad = None
        with Kernels() as kernels:
            function()
        counts.append(kernels.count)
    assert counts[0] - counts[1] <= 7  # one of them lays out the gradient of B
    assert kept_bytes(step, [x, A, B, W, bias]) == R * 8 * 4  # x A^T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_groups_are_independent(dtype):
    factors = [(torch.randn(R, I), torch.randn(O, R), scale) for scale in (0.5, 2.0, -1.0)]
    rows = LowRankRows.stack(factors, dtype)
    x, y = torch.randn(3, 4, I, dtype=dtype), torch.randn(3, 4, O, dtype=dtype)
    before, found = y.double(), rows(x, y)
    assert found.data_ptr() == y.data_ptr()
    for g, (A, B, scale) in enumerate(factors):
        expected = before[g] + scale * x[g].double() @ (B @ A).double().T
        gap = float((found[g].double() - expected).abs().max() / expected.abs().max())
        assert gap < (1e-6 if dtype == torch.float32 else 2e-2)


def test_updates_of_several_ranks_are_padded_unless_most_would_be_padding():
    factors = [(torch.randn(r, I), torch.randn(O, r), 0.5) for r in (2, 5, 1)]
    rows = LowRankRows.stack(factors, torch.float32)
    x, y = torch.randn(3, 4, I), torch.randn(3, 4, O)
    expected = [y[g] + 0.5 * x[g] @ (B @ A).T for g, (A, B, _) in enumerate(factors)]
    torch.testing.assert_close(rows(x, y), torch.stack(expected))
    assert LowRankRows.stack(factors[1:] + factors[2:], torch.float32) is None  # 15 for 7


def products_in_bfloat16(x, frozen, factors):
    """Two products of one tensor, whose saved tensors in bfloat16 are counted by storage."""
    kept = {}

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape == x.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    outputs = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        for A, B in factors:
            outputs.append(linear_with_low_rank(x, frozen, A, B, 2.0))
    return outputs, kept


def test_products_of_one_tensor_keep_one_copy_of_it_for_backward():
    """Outputs and gradients are those of a copy each, to the bit."""
    torch.manual_seed(0)
    frozen = nn.Linear(12, 8).requires_grad_(False)
    factors = [(torch.randn(2, 12), torch.randn(8, 2)) for _ in range(3)]
    x = torch.randn(2, 5, 12, requires_grad=True)
    outputs, kept = products_in_bfloat16(x, frozen, factors)
    assert len(kept) == 1
    sum(each.float().square().sum() for each in outputs).backward()
    parts, wanted = [], torch.zeros_like(x)
    for A, B in factors:  # alone: nothing is shared
        own = x.detach().clone().requires_grad_()
        (output,), _ = products_in_bfloat16(own, frozen, [(A, B)])
        output.float().square().sum().backward()
        parts.append(output)
        wanted = own.grad + wanted
    assert all(map(torch.equal, outputs, parts))
    torch.testing.assert_close(x.grad, wanted, atol=1e-6, rtol=1e-6)  # summed in float32


def test_a_tensor_that_has_changed_is_cast_again():
    torch.manual_seed(0)
    frozen = nn.Linear(12, 8).requires_grad_(False)
    A, B = torch.randn(2, 12), torch.randn(8, 2)
    x = torch.zeros(1, 5, 12, requires_grad=True) * 1.0
    with torch.autocast("cpu", torch.bfloat16):
        first = linear_with_low_rank(x, frozen, A, B, 2.0)
        x.add_(1.0)
        second = linear_with_low_rank(x, frozen, A, B, 2.0)
        wanted = linear_with_low_rank(torch.ones(1, 5, 12), frozen, A, B, 2.0)
    assert torch.equal(second, wanted)
    assert not torch.equal(first, second)


def test_a_copy_goes_with_its_tensor():
    frozen = nn.Linear(12, 8).requires_grad_(False)
    copies = []
    for _ in range(2):
        x = torch.randn(1, 5, 12, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            copy = cast_for_product(x)
        assert copy.dtype == torch.bfloat16
        copies.append(weakref.ref(copy.untyped_storage()))
        del copy, x
        gc.collect()
    assert [each() for each in copies] == [None, None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert cast_for_product(frozen.weight).dtype == torch.bfloat16
    assert cast_for_product(frozen.weight) is frozen.weight
