"""Low-rank products against the dense update in float64."""

import pytest
import torch

from petl.ops.low_rank import add_low_rank, add_up, project_down

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
def test_products_take_the_precision_of_the_activations(dtype):
    x, y, A, B = pieces(dtype)
    found = add_low_rank(y, x, A, B, 1.0)
    assert found.dtype == dtype
    found.float().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    expected = y.float() + x.float() @ (B @ A).T
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)


def test_a_float32_input_may_meet_a_half_precision_output():
    """As under autocast, where a layer norm hands on float32 and a linear layer gives bfloat16."""
    x, y, A, B = pieces()
    assert add_low_rank(y.bfloat16(), x, A, B, 1.0).dtype == torch.bfloat16


def test_an_output_that_is_a_view_is_left_alone():
    x, _, A, B = pieces()
    whole = torch.randn(2, 4, 2 * O)
    before = whole.clone()
    add_low_rank(whole[..., :O], x, A, B, 1.0)
    assert torch.equal(whole, before)
