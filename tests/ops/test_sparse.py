"""Products with a sparse update, compared with the dense matrix."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from petl.ops import sparse
from petl.ops.sparse import (
    Support,
    add_sparse,
    largest_products,
    products_at,
    sparse_linear,
    written,
)

T, P, Q = 7, 12, 20


def positions(count, size=P * Q, dtype=torch.int32):
    return torch.randperm(size)[:count].sort().values.to(dtype)


def written_out(index, values, shape=(P, Q)):
    dense = torch.zeros(shape[0] * shape[1], dtype=values.dtype)
    for at, value in zip(index.tolist(), values, strict=True):
        dense[at] = value
    return dense.view(shape)


@pytest.fixture(params=["sampled", "blocks"])
def way(request, monkeypatch):
    """Force either way to compute products, whichever would be faster."""
    share = 1.0 if request.param == "sampled" else 0.0
    monkeypatch.setattr(sparse, "SAMPLED_BELOW", dict.fromkeys(sparse.SAMPLED_BELOW, share))
    monkeypatch.setattr(sparse, "BLOCK", 50)  # several blocks, the last one shorter
    monkeypatch.setattr(sparse, "SAMPLED_ROWS", 3)  # likewise
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 30, P * Q])
def test_products_at_positions_equal_the_dense_product(way, dtype, count):
    left, right, index = torch.randn(T, P), torch.randn(T, Q), positions(count)
    left, right = left.to(dtype), right.to(dtype)
    whole = torch.stack(
        [torch.outer(a, b) for a, b in zip(left.double(), right.double(), strict=True)]
    )
    found = products_at(left, right, index)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found.double(), whole.sum(0).view(-1)[index.long()], atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("vectorized", [True, False])
def test_products_of_several_chunks_do_not_depend_on_the_memory_of_the_factors(
    way, monkeypatch, vectorized
):
    monkeypatch.setattr(sparse, "HAS_FBGEMM", vectorized and sparse.HAS_FBGEMM)
    index = positions(30)
    # transposed in memory, and columns of a wider tensor
    left, right = torch.randn(P, T).t(), torch.randn(T, 2 * Q)[:, 1::2]
    expected = [
        sum(float(left[t, at // Q]) * float(right[t, at % Q]) for t in range(T))
        for at in index.tolist()
    ]
    torch.testing.assert_close(products_at(left, right, index), torch.tensor(expected))


def test_products_over_no_token_are_zero(way):
    left, right = torch.randn(0, P), torch.randn(0, Q)
    assert torch.equal(products_at(left, right, positions(9)), torch.zeros(9))


@pytest.mark.parametrize("count", [1, 17, P * Q])
def test_the_largest_products_are_found_block_by_block(monkeypatch, count):
    monkeypatch.setattr(sparse, "BLOCK", 50)
    left, right = torch.randn(T, P), torch.randn(T, Q)
    sizes = (left.t() @ right).view(-1).abs().tolist()
    best = sorted(sorted(range(P * Q), key=lambda at: -sizes[at])[:count])
    found = largest_products(left, right, count, torch.int32)
    assert found.dtype == torch.int32
    assert found.tolist() == best


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("function", ["sparse_linear", "add_sparse"])
def test_values_and_gradients_are_those_of_the_dense_layer(way, transposed, function):
    I, O = (P, Q) if transposed else (Q, P)
    x = torch.randn(2, T, I, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(P, Q, dtype=torch.float64), torch.randn(O, dtype=torch.float64)
    index = positions(30)
    values = torch.randn(30, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, T, O, dtype=torch.float64)

    changed = weight + torch.zeros(P * Q, dtype=torch.float64).scatter(
        0, index.long(), values
    ).view(P, Q)
    expected = F.linear(x, changed.t() if transposed else changed, bias)
    wanted = torch.autograd.grad((expected * target).sum(), (x, values))

    before, support = weight.clone(), Support(index, transposed)
    if function == "sparse_linear":
        found = sparse_linear(x, weight, bias, values, support)
    else:
        y = F.linear(x, weight.t() if transposed else weight, bias)
        found = add_sparse(y, x, values, support)
    got = torch.autograd.grad((found * target).sum(), (x, values))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("function", ["sparse_linear", "add_sparse"])
def test_gradients_pass_gradcheck_on_a_square_biased_layer(way, function):
    n, index = 6, positions(8, 36)
    weight, bias = torch.randn(n, n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    values = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def output(x, values):
        if function == "sparse_linear":
            return sparse_linear(x, weight, bias, values, Support(index))
        return add_sparse(F.linear(x, weight, bias), x, values, Support(index))

    assert torch.autograd.gradcheck(output, (x, values))


def test_sums_are_rounded_once_in_half_precision():
    weight = torch.randn(P, Q, dtype=torch.bfloat16)
    index, values = positions(50), torch.randn(50) * 1e-2
    expected = weight.float().view(-1)[index.long()] + values
    with written(weight, index, values, torch.bfloat16) as changed:
        assert torch.equal(changed.view(-1)[index.long()], expected.bfloat16())


def shared(weight):
    return weight.clone().share_memory_()


def spread(weight):
    return weight.t().contiguous().t()


@pytest.mark.parametrize("make", [torch.clone, shared, spread], ids=["plain", "shared", "spread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_restored_bit_exact(make, dtype):
    weight = make(torch.randn(P, Q))
    before, version = weight.clone(), weight._version
    index, values = positions(50), torch.randn(50)
    with pytest.raises(KeyError), written(weight, index, values, dtype) as changed:  # noqa: PT012
        torch.testing.assert_close(changed, (before + written_out(index, values)).to(dtype))
        in_place = changed.data_ptr() == weight.data_ptr()
        assert in_place == (make is torch.clone and dtype == torch.float32)
        raise KeyError
    assert torch.equal(weight, before)
    assert (
        weight._version == version
    )  # so that what others saved for backward still counts as whole


def test_threads_that_share_a_weight_do_not_see_each_others_values():
    weight, x = torch.randn(300, 300), torch.randn(40, 300)
    supports = [(positions(900, 90_000), torch.randn(900)) for _ in range(4)]
    expected = [F.linear(x, weight + written_out(i, v, (300, 300))) for i, v in supports]
    wrong = []

    def work(number):
        index, values = supports[number]
        for _ in range(40):
            found = sparse_linear(x, weight, None, values, Support(index))
            if not torch.allclose(found, expected[number], atol=1e-3):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_given_products_replace_the_gradient_and_see_both_factors_once():
    index, x = positions(5), torch.randn(3, Q)
    values, calls = torch.zeros(5, requires_grad=True), []

    def products(left, right):
        calls.append((left, right))
        return torch.arange(5.0)

    y = sparse_linear(x, torch.randn(P, Q), None, values, Support(index), products)
    y.sum().backward()
    assert values.grad.tolist() == [0, 1, 2, 3, 4]
    ((left, right),) = calls
    assert torch.equal(left, torch.ones(3, P))
    assert torch.equal(right, x)


def test_shapes_alone_are_enough_for_a_dry_run():
    """`petl plan` runs a training pass on tensors without values."""
    with FakeTensorMode():
        x, weight = torch.randn(2, 3, Q, requires_grad=True), torch.randn(P, Q)
        values, index = torch.zeros(9, requires_grad=True), torch.empty(9, dtype=torch.int32)
        y = sparse_linear(x, weight, None, values, Support(index))
        y = add_sparse(y, x, values, Support(index))
        y.sum().backward()
        assert y.shape == (2, 3, P)
        assert (x.grad.shape, values.grad.shape) == (x.shape, values.shape)


def test_a_traced_layer_leaves_the_weight_as_it_is():
    layer = torch.nn.Linear(Q, P).requires_grad_(False)
    layer.values = torch.nn.Parameter(torch.randn(5))
    support, x = Support(positions(5)), torch.randn(3, Q)
    layer.forward = lambda x: sparse_linear(x, layer.weight, layer.bias, layer.values, support)
    before = layer.weight.clone()
    with torch.no_grad():
        expected = layer(x)
        traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(x), expected)  # with gradients
    assert torch.equal(layer.weight, before)


def test_an_update_is_added_under_autocast(way):
    index, values = positions(5), torch.randn(5)
    y, x = torch.randn(3, P), torch.randn(3, Q)
    with torch.autocast("cpu", torch.bfloat16):
        found = add_sparse(y, x, values, Support(index))
    expected = y + x @ written_out(index, values).t()
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
