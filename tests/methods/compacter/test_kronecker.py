import pytest
import torch
from bench.counters import Kernels

from petl.methods.compacter.kronecker import times_factored, times_full


def dense(rule, weight):
    """Return the sum of Kronecker products, [I, O]."""
    return sum(torch.kron(r, b) for r, b in zip(rule, weight, strict=True))


@pytest.mark.parametrize(("N", "I", "O", "Q"), [(2, 6, 10, 1), (4, 8, 12, 3), (3, 12, 6, 2)])
def test_products_equal_the_dense_matrix(N, I, O, Q):
    torch.set_default_dtype(torch.float64)
    try:
        rule, x = torch.randn(N, N, N), torch.randn(2, 5, I)
        left, right = torch.randn(N, I // N, Q), torch.randn(N, Q, O // N)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = x @ dense(rule, left @ right)
    torch.testing.assert_close(times_factored(x, rule, left, right), expected)
    torch.testing.assert_close(times_full(x, rule, left @ right), expected)


def test_the_order_of_the_factors_matters():
    """The reference of these tests distinguishes the two orders of factors."""
    rule, weight, x = torch.randn(2, 2, 2), torch.randn(2, 3, 5), torch.randn(4, 6)
    swapped = x @ sum(torch.kron(b, r) for r, b in zip(rule, weight, strict=True))
    assert not torch.allclose(times_full(x, rule, weight), swapped)


def test_no_tensor_of_the_size_of_the_matrix_is_formed():
    """For one token every intermediate tensor is far smaller than H."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Sizes.largest = max(Sizes.largest, out.numel())
            return out

    N, I, O = 4, 64, 96
    left, right = torch.randn(N, I // N, 1), torch.randn(N, 1, O // N)
    with Sizes():
        times_factored(torch.randn(1, I), torch.randn(N, N, N), left, right)
    assert Sizes.largest <= max(I, O, N**3)


def factors(N, I, O, Q):
    """Return x of six tokens, rule, left, right, bias and residual."""
    sizes = (2, 3, I), (N, N, N), (N, I // N, Q), (N, Q, O // N), (O,), (2, 3, O)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize(("N", "I", "O", "Q"), [(2, 4, 6, 1), (3, 6, 3, 2)])
def test_bias_and_residual_are_added_and_all_gradients_are_exact(N, I, O, Q):
    x, rule, left, right, bias, beside = tensors = factors(N, I, O, Q)
    expected = beside + x @ dense(rule, left @ right) + bias
    torch.testing.assert_close(times_factored(*tensors), expected)
    with torch.no_grad():
        torch.testing.assert_close(times_factored(*tensors), expected)
    assert torch.autograd.gradcheck(times_factored, tensors)
    assert torch.autograd.gradgradcheck(times_factored, tensors)
    assert torch.autograd.gradcheck(times_factored, tensors[:4])


def calls(tensors):
    """Return the kernels of forward, and of backward to all inputs that need a gradient."""
    with Kernels() as forward:
        out = times_factored(*tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    with Kernels() as backward:
        torch.autograd.grad(out, wanted, out)
    return forward.count, backward.count


@pytest.mark.parametrize("frozen", range(5))
def test_unneeded_gradients_are_not_computed(frozen):
    tensors = factors(4, 8, 12, 1)
    tensors[frozen].requires_grad_(False)
    assert calls(tensors) == (4, 6)


@pytest.mark.parametrize("plus", [True, False])
def test_stacked_sums_are_computed_independently(plus):
    G, T, N, I, O, Q = 3, 5, 2, 6, 10, 2
    x, rule = torch.randn(G, T, I), torch.randn(G, N, N, N)
    left, right = torch.randn(G, N, I // N, Q), torch.randn(G, N, Q, O // N)
    bias, beside = (torch.randn(G, 1, O), torch.randn(G, T, O)) if plus else (None, None)
    with torch.no_grad():
        found = times_factored(x, rule, left, right, bias, beside)
    for g in range(G):
        expected = x[g] @ dense(rule[g], left[g] @ right[g])
        for term in (bias, beside):
            expected = expected if term is None else expected + term[g]
        torch.testing.assert_close(found[g], expected)


@pytest.mark.parametrize("grad", [True, False])
def test_a_batch_without_rows_gives_none(grad):
    rule, left, right = torch.randn(2, 2, 2), torch.randn(2, 3, 1), torch.randn(2, 1, 5)
    with torch.set_grad_enabled(grad):
        for tokens in ((0,), (0, 3), (2, 0)):
            x = torch.randn(*tokens, 6, requires_grad=grad)
            y = times_factored(x, rule, left, right)
            assert y.shape == times_full(x, rule, left @ right).shape == (*tokens, 10)
    if grad:
        y.sum().backward()
        assert x.grad.shape == x.shape
