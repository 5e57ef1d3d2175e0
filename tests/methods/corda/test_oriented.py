"""The oriented decomposition, compared with its equations."""

import math

import pytest
import torch

from petl.methods.corda.oriented import balanced, damped, log_compactness, oriented_svd, truncated

O, I, K = 7, 5, 5


def make(rank: int = I):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, rank, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(rank, I, generator=generator, dtype=torch.float64)
    W = torch.randn(O, I, generator=generator, dtype=torch.float64)
    return W, X.t() @ X


def test_damping_starts_at_its_fraction_of_the_mean_diagonal():
    _, C = make()
    shifted, inverse = damped(C, 0.01, 0.05)
    expected = C + 0.01 * C.trace() / I * torch.eye(I, dtype=torch.float64)
    torch.testing.assert_close(shifted, expected)
    torch.testing.assert_close(inverse @ expected, torch.eye(I, dtype=torch.float64))


def test_damping_doubles_until_the_inverse_is_accurate():
    C = make(rank=1)[1].float() * 1e4
    shifted, inverse = damped(C, 1e-9, 1e-4)
    share = float((shifted - C).diagonal().mean() / C.diagonal().mean())
    assert share > 1e-7
    assert math.log2(share / 1e-9) == pytest.approx(round(math.log2(share / 1e-9)), abs=0.2)
    assert float(torch.dist(shifted @ inverse, torch.eye(I))) < 1e-4


@pytest.mark.parametrize("C", [torch.zeros(3, 3), torch.full((3, 3), torch.nan)])
def test_zero_or_nan_moments_are_an_error(C):
    with pytest.raises(ValueError, match="second moment"):
        damped(C, 0.01, 0.05)


def test_components_add_up_to_the_weight_and_are_orthogonal_under_c():
    W, C = make()
    svd = oriented_svd(W, damped(C, 0.01, 0.05))
    torch.testing.assert_close(svd.U @ svd.S.diag() @ svd.Vt, W)
    shifted, _ = damped(C, 0.01, 0.05)
    right = svd.Vt @ shifted
    one = torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(svd.U.t() @ svd.U, one)
    torch.testing.assert_close(right @ right.t(), one)
    assert (svd.S.diff() <= 0).all()


@pytest.mark.parametrize("leading", [True, False])
def test_truncated_components_are_the_first_or_last_and_balanced(leading):
    W, C = make()
    svd = oriented_svd(W, damped(C, 0.01, 0.05))
    S = svd.S[:2] if leading else svd.S[3:]
    A, B = balanced(truncated(svd, 2, leading=leading), 0.5)
    torch.testing.assert_close(B.norm(dim=0), (S / 0.5).sqrt())
    found = torch.linalg.svdvals(0.5 * B @ A @ damped(C, 0.01, 0.05)[0])
    torch.testing.assert_close(found[:2], S)
    assert float(found[2:].max()) < 1e-9 * float(svd.S[0])


def test_scaling_c_changes_nothing():
    W, C = make()
    one, other = (oriented_svd(W, damped(c, 0.01, 0.05)) for c in (C, 256 * C))
    for leading in (True, False):
        (A, B), (A2, B2) = (
            balanced(truncated(svd, 2, leading=leading), 1.0) for svd in (one, other)
        )
        torch.testing.assert_close(B2 @ A2, B @ A)


def test_compactness_is_that_of_the_damped_matrix():
    C = torch.diag(torch.tensor([9.0, 4.0, 1.0]))
    shift = 0.01 * 14 / 3
    expected = math.log(math.sqrt(6 * (9 + shift)) / (1 + shift))
    assert log_compactness(damped(C, 0.01, 0.05), 6) == pytest.approx(expected, rel=1e-5)
