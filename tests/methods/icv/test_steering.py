"""Steering vectors: directions against numpy's SVD, shifts against loops in Python floats."""

import math

import numpy as np
import pytest
import torch

from petl.methods.icv.steering import Steer, direction, steered, unit

# Directions


@pytest.mark.parametrize(("n", "D"), [(5, 12), (9, 4)])
def test_the_direction_is_the_mean_plus_numpys_first_singular_vectors(n, D):
    d = np.random.default_rng(n).normal(1.0, 2.0, (n, D))
    mean = d.mean(0)
    U, _, Vt = np.linalg.svd(d - mean)
    for rank in (1, 2):
        expected = mean.copy()
        for k in range(rank):
            u = U[:, k]
            expected += Vt[k] * np.sign(u[np.argmax(np.abs(u))])
        found = direction(torch.from_numpy(d).float(), rank).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_demonstration_gives_its_difference():
    d = torch.tensor([[1.0, -2.0, 3.0]])
    assert torch.equal(direction(d), d[0])
    assert torch.equal(direction(d, rank=4), d[0])


def test_two_demonstrations_give_their_difference_as_the_component():
    """The entries of the left vector are equally large, so that the first one is positive."""
    a, b = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 0.0, 0.0])
    component = torch.tensor([0.6, 0.0, 0.8])
    torch.testing.assert_close(direction(torch.stack([a, b])), a / 2 + component)
    torch.testing.assert_close(direction(torch.stack([b, a])), a / 2 - component)
    # there is no second one
    torch.testing.assert_close(direction(torch.stack([a, b]), rank=2), a / 2 + component)


def test_equal_demonstrations_have_no_component():
    d = torch.randn(7, generator=torch.Generator().manual_seed(0)).expand(4, 7)
    torch.testing.assert_close(direction(d), d[0])


def test_the_sign_does_not_depend_on_that_of_the_decomposition(monkeypatch):
    d = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    expected = direction(d)
    eigh = torch.linalg.eigh

    def flipped(matrix):
        values, left = eigh(matrix)
        return values, -left

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    torch.testing.assert_close(direction(d), expected)


# Shifts


def by_loop(x, steers, *, keep_norm):
    """x' of one state, from the formulas, in Python floats."""

    def norm(a):
        return math.sqrt(sum(value * value for value in a))

    def over(a, size):
        return [value / size if size else value for value in a]

    y = [0.0] * len(x)
    for v, w, cosine in steers:
        v = v.tolist()
        cos = sum(-a * b for a, b in zip(x, v, strict=True)) / (norm(x) * norm(v) or 1.0)
        factor = 1 + max(0.0, cos) if cosine else 1.0
        step = [w * factor * value for value in over(v, norm(v))]
        if not keep_norm:
            step = [w * value for value in v]
        y = [a + b / len(steers) for a, b in zip(y, step, strict=True)]
    if not keep_norm:
        return [a + b for a, b in zip(x, y, strict=True)]
    moved = [a + b for a, b in zip(over(x, norm(x)), y, strict=True)]
    return [norm(x) * value for value in over(moved, norm(moved))]


@pytest.mark.parametrize(
    ("cosine", "keep_norm", "strengths"),
    [(True, True, [0.4]), (True, True, [0.4, -0.3, 0]), (False, True, [0.4]),
     (False, False, [0.4, 1.5])],
)  # fmt: skip
def test_shifted_states_are_those_of_the_formula(cosine, keep_norm, strengths):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=generator) * 5
    x[0, 0] = 0
    steers = [Steer(torch.randn(8, generator=generator), w, cosine) for w in strengths]
    found = steered(x, steers, keep_norm=keep_norm)
    for i in range(2):
        for t in range(3):
            expected = torch.tensor(by_loop(x[i, t].tolist(), steers, keep_norm=keep_norm))
            torch.testing.assert_close(found[i, t], expected, atol=1e-5, rtol=1e-5)
    if keep_norm:
        torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_opposite_states_move_twice_as_far_as_aligned_ones():
    v = torch.tensor([3.0, 4.0])
    x = torch.tensor([[4.0, -3.0], [0.6, 0.8], [-0.6, -0.8]])  # across, along, against
    w, u = 0.1, unit(v)
    across, along, against = steered(x, [Steer(v, w, True)], keep_norm=True)
    torch.testing.assert_close(across, 5 * unit(unit(x[0]) + w * u))
    torch.testing.assert_close(along, x[1])
    # -u + 2 w u is shorter and of the same direction; w > 1/2 turns the state around
    torch.testing.assert_close(against, x[2])
    factors = [1 + max(0.0, -float(unit(state) @ u)) for state in x]
    assert factors == pytest.approx([1, 1, 2])
    torch.testing.assert_close(steered(x[2:], [Steer(v, 0.6, True)], keep_norm=True), -x[2:])
    torch.testing.assert_close(steered(x[2:], [Steer(v, 0.6, False)], keep_norm=True), x[2:])


def test_half_precision_is_computed_in_float32_and_cast_back():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    steers = [Steer(torch.arange(16.0), 0.2, True)]
    found = steered(x, steers, keep_norm=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, steered(x.float(), steers, keep_norm=True).bfloat16())
    assert steered(x.double(), steers, keep_norm=True).dtype == torch.float64


def test_a_zero_vector_has_a_finite_gradient():
    v = torch.zeros(4, requires_grad=True)
    steered(torch.randn(2, 4), [Steer(v, 0.1, True)], keep_norm=True).sum().backward()
    assert v.grad.isfinite().all()
