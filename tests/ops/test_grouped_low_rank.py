"""Low-rank updates of several adapters beside one frozen layer, compared with each on its own."""

import pytest
import torch

from petl.ops.dropout import keep_mask
from petl.ops.grouped_low_rank import (
    add_grouped_low_rank,
    grouped_low_rank_linear,
    grouped_masks,
)
from petl.ops.low_rank import low_rank_linear

K, T, I, O, R = 3, 5, 6, 4, 2


def pieces(dtype: torch.dtype = torch.float64):
    x = torch.randn(K, T, I, dtype=dtype, requires_grad=True)
    A = torch.randn(K, R, I, dtype=dtype, requires_grad=True)
    B = torch.randn(K, O, R, dtype=dtype, requires_grad=True)
    return x, torch.randn(O, I, dtype=dtype), torch.randn(O, dtype=dtype), A, B


@pytest.mark.parametrize("scales", [[2.0, 2.0, 2.0], [2.0, 0.5, 1.0]])
def test_each_adapter_has_its_own_update_and_gradients(scales):
    """Compared with the equation, whose gradients autograd derives."""
    x, W, b, A, B = pieces()
    mask, means = grouped_masks(x, [0.5, 0.0, 0.25], [None] * K)
    assert means[1] == 1.0
    assert mask is not None
    assert mask.flatten(1).all(1).tolist() == [False, True, False]
    found = grouped_low_rank_linear(x, (W, b), A, B, scales, mask)
    kept = mask.double()
    expected = torch.stack(
        [x[k] @ W.T + b + scales[k] * (kept[k] * x[k]) @ A[k].T @ B[k].T for k in range(K)]
    )
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weight).sum(), (x, A, B))
    for own, derived in zip(
        gradients, torch.autograd.grad((expected * weight).sum(), (x, A, B)), strict=True
    ):
        torch.testing.assert_close(own, derived)
    added = add_grouped_low_rank(x @ W.T + b, x, A, B, scales, mask)
    torch.testing.assert_close(added, expected)


def test_gradients_of_gradients_are_right():
    x, W, b, A, B = pieces()
    call = lambda *tensors: grouped_low_rank_linear(tensors[0], (W, b), *tensors[1:], [0.7] * K)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, A, B))


@pytest.mark.parametrize("shape", [(384, 384, 16), (96, 64, 24)])
def test_with_one_scale_each_adapter_equals_its_own_call_to_the_bit(shape):
    inputs, outputs, tokens = shape
    W, b = torch.randn(outputs, inputs), torch.randn(outputs)
    x, grad = torch.randn(K, tokens, inputs), torch.randn(K, tokens, outputs)
    A, B = torch.randn(K, 8, inputs), torch.randn(K, outputs, 8)
    together = [t.clone().requires_grad_() for t in (x, A, B)]
    y = grouped_low_rank_linear(together[0], (W, b), *together[1:], [2.0] * K)
    y.backward(grad)
    for k in range(K):
        own = [t[k].clone().requires_grad_() for t in (x, A, B)]
        own_y = low_rank_linear(own[0], (W, b), own[1], own[2], 2.0)
        own_y.backward(grad[k])
        assert torch.equal(y[k], own_y)
        for one, all_of_them in zip(own, together, strict=True):
            assert torch.equal(one.grad, all_of_them.grad[k])


def test_an_adapter_draws_its_mask_from_its_own_generator():
    x = torch.randn(2, T, I)
    rates = [0.5, 0.25]
    mask, means = grouped_masks(x, rates, [torch.Generator().manual_seed(s) for s in (1, 2)])
    for k, seed in enumerate((1, 2)):
        torch.manual_seed(seed)
        alone, mean = keep_mask(x[k], rates[k])
        assert torch.equal(mask[k], alone)
        assert means[k] == mean


@pytest.mark.parametrize("experts", [1, 2])
def test_a_gate_scales_the_rows_of_each_expert(experts):
    x, W, b, A, B = pieces()
    gate = torch.rand(K, T, experts, dtype=torch.float64, requires_grad=True)
    found = grouped_low_rank_linear(x, (W, b), A, B, [0.7] * K, gate=gate)
    rows = gate.repeat_interleave(R // experts, -1)  # an expert has R / E rows
    expected = torch.stack(
        [x[k] @ W.T + b + 0.7 * (rows[k] * (x[k] @ A[k].T)) @ B[k].T for k in range(K)]
    )
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    inputs = (x, A, B, gate)
    derived = torch.autograd.grad((expected * weight).sum(), inputs)
    for own, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs), derived, strict=True
    ):
        torch.testing.assert_close(own, other)
    added = add_grouped_low_rank(x @ W.T + b, x, A, B, [0.7] * K, gate=gate)
    torch.testing.assert_close(added, expected)


def test_nothing_is_drawn_without_dropout():
    state = torch.get_rng_state()
    assert grouped_masks(torch.randn(2, T, I), [0.0, 0.0], [None] * 2)[0] is None
    torch.set_rng_state(state)
