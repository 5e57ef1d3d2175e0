"""Routing, compared with loops over tokens and experts."""

import math

import pytest
import torch
from bench.counters import kept_bytes
from torch import Tensor

from petl.methods.mola.routing import (
    RoutedRows,
    balance_weights,
    busiest,
    expert_sums,
    float_linear,
    top_k_gates,
)


def top_of(logits: list[float], k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda e: -logits[e])[:k]


@pytest.mark.parametrize(("E", "k"), [(2, 1), (4, 2), (5, 5)])
def test_gates_are_a_softmax_over_the_picked_logits(E, k):
    logits = torch.randn(6, E)
    gate, picked, prob = top_k_gates(logits, k)
    for t, row in enumerate(logits.tolist()):
        chosen = top_of(row, k)
        total = sum(math.exp(row[e]) for e in chosen)
        for e in range(E):
            expected = math.exp(row[e]) / total if e in chosen else 0.0
            assert float(gate[t, e]) == pytest.approx(expected, abs=1e-6)
            assert float(picked[t, e]) == (e in chosen)
            share = math.exp(row[e]) / sum(math.exp(x) for x in row)
            assert float(prob[t, e]) == pytest.approx(share, abs=1e-6)


def test_gradient_flows_through_the_picked_probabilities_only():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], requires_grad=True)
    gate, picked, _ = top_k_gates(logits, 2)
    assert not picked.requires_grad
    (gate * torch.tensor([1.0, 5.0, 7.0, 7.0])).sum().backward()
    p = 1 / (1 + math.exp(-1))  # softmax of 3 and 2
    slope = p * (1 - p) * (1.0 - 5.0)
    torch.testing.assert_close(logits.grad, torch.tensor([[slope, -slope, 0.0, 0.0]]))


def one_hot_picks(prob: Tensor, k: int) -> Tensor:
    picked = torch.zeros_like(prob)
    for t, row in enumerate(prob.tolist()):
        picked[t, top_of(row, k)] = 1.0
    return picked


def balance_loss(picked: Tensor, prob: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    picks_E, prob_E = expert_sums(picked, prob, mask)
    return (balance_weights(picks_E, k) * prob_E).sum()


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_is_the_formula(masked):
    T, E, k = 9, 4, 2
    prob = torch.randn(T, E).softmax(-1)
    picked = one_hot_picks(prob, k)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0]) if masked else None
    kept = [t for t in range(T) if mask is None or mask[t]]
    f = [sum(float(picked[t, e]) for t in kept) / (len(kept) * k) for e in range(E)]
    P = [sum(float(prob[t, e]) for t in kept) / len(kept) for e in range(E)]
    loss = float(balance_loss(picked, prob, k, mask))
    assert loss == pytest.approx(E * sum(a * b for a, b in zip(f, P, strict=True)), rel=1e-5)
    picks_E, prob_E = expert_sums(picked, prob, mask)
    assert float(busiest(picks_E)) == pytest.approx(E * max(f), rel=1e-5)
    weighted = balance_weights(picks_E, k, factor=0.3) @ prob_E
    assert float(weighted) == pytest.approx(0.3 * loss, rel=1e-5)


def test_balance_loss_is_one_for_a_uniform_router_and_grows_to_the_number_of_experts():
    uniform = torch.full((8, 4), 0.25)
    assert float(balance_loss(one_hot_picks(torch.randn(8, 4), 1), uniform, 1)) == 1.0
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 1.0
    assert float(balance_loss(collapsed, collapsed, 1)) == 4.0


def test_only_the_mean_probability_carries_a_gradient():
    prob = torch.randn(5, 3).softmax(-1).requires_grad_()
    picked = one_hot_picks(prob.detach(), 1).requires_grad_()
    balance_loss(picked, prob, 1).backward()
    assert picked.grad is None
    share_E = picked.detach().mean(0)
    torch.testing.assert_close(prob.grad, (3 * share_E / 5).expand(5, 3))


def test_sums_of_two_halves_give_the_loss_of_the_batch():
    prob = torch.randn(9, 4).softmax(-1)
    picked, mask = one_hot_picks(prob, 2), torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0])
    halves = [expert_sums(picked[rows], prob[rows], mask[rows]) for rows in (slice(4), slice(4, 9))]
    picks_E, prob_E = (sum(parts) for parts in zip(*halves, strict=True))
    found = (balance_weights(picks_E, 2) * prob_E).sum()
    torch.testing.assert_close(found, balance_loss(picked, prob, 2, mask))


def test_a_batch_of_padding_alone_has_a_finite_loss():
    prob = torch.randn(4, 3).softmax(-1).requires_grad_()
    loss = balance_loss(one_hot_picks(prob, 1), prob, 1, torch.zeros(4))
    loss.backward()
    assert loss.item() == 0.0
    assert prob.grad.isfinite().all()


def test_router_logits_of_a_half_precision_input_are_float32_and_save_no_copy():
    x = torch.randn(6, 8).bfloat16().requires_grad_()
    W, slope = torch.randn(3, 8, requires_grad=True), torch.randn(6, 3)
    found, _ = float_linear(x, W)
    assert found.dtype == torch.float32
    # to float32's precision: with AMX, a product as a linear layer has another kernel than `@`
    torch.testing.assert_close(found, x.float() @ W.t())
    found.backward(slope)
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, (slope @ W).bfloat16())
    torch.testing.assert_close(W.grad, slope.t() @ x.detach().float())
    assert kept_bytes(lambda: float_linear(x, W), [x, W]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_router_logits_is_added_to_other_gradients_of_the_input(dtype):
    x, W = torch.randn(2, 3, 8, dtype=dtype), torch.randn(4, 8)
    grads = []
    for joined in (False, True):
        x_, W_ = x.clone().requires_grad_(), W.clone().requires_grad_()
        logits, same = float_linear(x_, W_)
        assert same.shape == x.shape
        (logits.sin().sum() + (same if joined else x_).float().cos().sum()).backward()
        grads.append((x_.grad, W_.grad))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(*grads, **tolerance)


def test_the_input_of_a_router_needs_no_gradient_because_the_router_does():
    x = torch.randn(3, 8)
    logits, same = float_linear(x, torch.randn(4, 8, requires_grad=True))
    assert logits.requires_grad
    assert not same.requires_grad


@pytest.mark.parametrize("T", [1, 3, 4, 9])  # with 8 experts, of which 2 are picked
def test_rows_of_several_routers_are_independent(T):
    G, E, R, I, O, k = 3, 8, 2, 6, 5, 2
    x, y, router = torch.randn(G, T, I), torch.randn(G, T, O), torch.randn(G, E, I)
    A, B, scale = torch.randn(G, E, R, I), torch.randn(G, E, R, O), torch.tensor([0.5, 2.0, -1.0])
    found = RoutedRows(router, A, B, scale.view(-1, 1, 1), k)(x, y.clone())
    for g in range(G):
        for t in range(T):
            logits = (router[g] @ x[g, t]).tolist()
            chosen = top_of(logits, k)
            total = sum(math.exp(logits[e]) for e in chosen)
            update = sum(
                math.exp(logits[e]) / total * (A[g, e] @ x[g, t]) @ B[g, e] for e in chosen
            )
            torch.testing.assert_close(
                found[g, t], y[g, t] + scale[g] * update, atol=1e-5, rtol=1e-5
            )


def test_experts_that_no_row_picks_are_not_read():
    router = torch.eye(4).expand(2, 4, 4)
    A, B = torch.randn(2, 4, 3, 4), torch.randn(2, 4, 3, 5)
    A[:, 2:], B[:, 2:] = math.nan, math.nan
    x = torch.tensor([2.0, 1.0, 0.0, 0.0]).expand(2, 1, 4)
    assert (
        RoutedRows(router, A, B, torch.ones(2, 1, 1), 2)(x, torch.zeros(2, 1, 5)).isfinite().all()
    )


@pytest.mark.parametrize("T", [1, 9])
def test_rows_are_routed_in_float32_under_autocast(T):
    pieces = torch.randn(2, 8, 6), torch.randn(2, 8, 3, 6), torch.randn(2, 8, 3, 5)
    rows, x = RoutedRows(*pieces, torch.ones(2, 1, 1), 2), torch.randn(2, T, 6)
    expected = rows(x, torch.zeros(2, T, 5))
    with torch.autocast("cpu", torch.bfloat16):
        found = rows(x, torch.zeros(2, T, 5, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)
