"""The smooth count and its slope, compared with the formula and autograd."""

import pytest
import torch
from bench.counters import Kernels

from petl.methods.losses.density import counts as density
from petl.methods.losses.density.counts import add_slope, count_nonzero


@pytest.fixture(params=[64, 2**16])
def _chunk(request, monkeypatch):
    monkeypatch.setitem(density.CHUNK, "cpu", request.param)


def literal(a, eps, mask=None):
    a = a.double().reshape(-1, a.shape[-1])
    h = a**2 / (a**2 + eps)
    return (h if mask is None else h[mask.bool()]).sum()


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("eps", [20.0, 1e-2, 1e-7, 1e-14])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-8])
def test_the_count_and_its_slope_are_those_of_the_formula(eps, scale):
    a = (torch.randn(3, 17, 40) * scale).relu()
    mask, before = torch.rand(51) > 0.3, a.clone()
    for rows in (None, mask):
        wanted = literal(a, eps, rows)
        torch.testing.assert_close(
            count_nonzero(a, eps, rows).double(), wanted, atol=1e-2, rtol=1e-5
        )
        exact = a.double().requires_grad_()
        (slope,) = torch.autograd.grad(literal(exact, eps, rows), exact)
        grad = torch.randn_like(a)
        found = add_slope(grad, a, eps, torch.tensor(0.5), rows)
        expected = grad + 0.5 * slope.float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(a, before)


def test_the_slope_is_largest_at_the_root_of_a_third_of_eps():
    eps = 1e-7
    a = torch.tensor([[(eps / 3) ** 0.5, eps**0.5, 0.0]])
    slope = add_slope(torch.zeros(1, 3), a, eps, torch.tensor(1.0))
    assert slope[0, 0] == pytest.approx(0.6495 / eps**0.5, rel=1e-3)  # 2,054
    assert count_nonzero(a[:, 1:2], eps) == pytest.approx(0.5)
    assert slope[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_counted_in_float32(dtype):
    """Squares below 2.4e-4 vanish in float16, and so would eps."""
    a = (torch.randn(5, 64) * 1e-3).to(dtype)
    assert count_nonzero(a, 1e-7) == pytest.approx(float(literal(a, 1e-7)), rel=1e-5)
    grad = torch.zeros(5, 64, dtype=dtype)
    assert add_slope(grad, a, 1e-7, torch.tensor(1.0)).dtype == dtype


def test_a_chunk_needs_three_kernels_and_its_slope_four(monkeypatch):
    monkeypatch.setitem(density.CHUNK, "cpu", 128)
    counts = []
    for rows in (2, 8):  # one chunk and four
        a, factor = torch.randn(rows, 64), torch.tensor(1.0)
        with Kernels() as count:
            count_nonzero(a, 1e-7)
        with Kernels() as slope:
            add_slope(a, a, 1e-7, factor)
        counts.append((count.count, slope.count))
    assert counts == [(3 + 3, 4 + 2), (4 * 3 + 3, 4 * 4 + 2)]
