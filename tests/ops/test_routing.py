"""Routing against loops over tokens and experts."""

import math

import pytest
import torch
from torch import Tensor

from petl.bench.counters import kept_bytes
from petl.ops.routing import balance_weights, expert_sums, float_linear, load, top_k_gates


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


def balance_loss(picked: Tensor, prob: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    counts, prob_E = expert_sums(picked, prob, mask)
    return (balance_weights(counts) * prob_E).sum(), load(counts)


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_is_the_formula(masked):
    T, E, k = 9, 4, 2
    prob = torch.randn(T, E).softmax(-1)
    picked = one_hot_picks(prob, k)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0]) if masked else None
    kept = [t for t in range(T) if mask is None or mask[t]]
    f = [sum(float(picked[t, e]) for t in kept) / (len(kept) * k) for e in range(E)]
    P = [sum(float(prob[t, e]) for t in kept) / len(kept) for e in range(E)]
    loss, load = balance_loss(picked, prob, mask)
    assert float(loss) == pytest.approx(E * sum(a * b for a, b in zip(f, P, strict=True)), rel=1e-5)
    assert load.tolist() == pytest.approx(f, rel=1e-5)


def test_balance_loss_is_one_for_a_uniform_router_and_grows_to_the_number_of_experts():
    uniform = torch.full((8, 4), 0.25)
    assert float(balance_loss(one_hot_picks(torch.randn(8, 4), 1), uniform, None)[0]) == 1.0
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 1.0
    assert float(balance_loss(collapsed, collapsed, None)[0]) == 4.0


def test_only_the_mean_probability_carries_a_gradient():
    prob = torch.randn(5, 3).softmax(-1).requires_grad_()
    picked = one_hot_picks(prob.detach(), 1).requires_grad_()
    loss, load = balance_loss(picked, prob, None)
    loss.backward()
    assert picked.grad is None
    assert not load.requires_grad
    torch.testing.assert_close(prob.grad, (3 * load / 5).expand(5, 3))


def test_sums_of_two_halves_give_the_loss_of_the_whole():
    prob = torch.randn(9, 4).softmax(-1)
    picked, mask = one_hot_picks(prob, 2), torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0])
    halves = [expert_sums(picked[rows], prob[rows], mask[rows]) for rows in (slice(4), slice(4, 9))]
    counts, prob_E = (sum(parts) for parts in zip(*halves, strict=True))
    expected, _ = balance_loss(picked, prob, mask)
    torch.testing.assert_close((balance_weights(counts) * prob_E).sum(), expected)


def test_a_batch_of_padding_alone_has_a_finite_loss():
    prob = torch.randn(4, 3).softmax(-1).requires_grad_()
    loss, _ = balance_loss(one_hot_picks(prob, 1), prob, torch.zeros(4))
    loss.backward()
    assert float(loss) == 0.0
    assert prob.grad.isfinite().all()


def test_router_logits_of_a_half_precision_input_are_float32_and_keep_no_copy_of_it():
    x = torch.randn(6, 8).bfloat16().requires_grad_()
    W, slope = torch.randn(3, 8, requires_grad=True), torch.randn(6, 3)
    found = float_linear(x, W)
    assert found.dtype == torch.float32
    assert torch.equal(found, x.float() @ W.t())
    found.backward(slope)
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, (slope @ W).bfloat16())
    torch.testing.assert_close(W.grad, slope.t() @ x.detach().float())
    assert kept_bytes(lambda: float_linear(x, W), [x, W]) == 0
