"""The distance of rows from orthonormal, against autograd through the plain formula."""

import torch

from petl.ops.orthogonality import gram_distance


def plain(M):
    return torch.linalg.matrix_norm(M @ M.t() - torch.eye(len(M), dtype=M.dtype))


def test_value_and_gradient_are_those_of_the_formula():
    M = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(3 * plain(M), M)[0]
    value = gram_distance(M)
    assert torch.allclose(value, plain(M))
    assert torch.allclose(torch.autograd.grad(3 * value, M)[0], expected)
    assert torch.autograd.gradcheck(lambda m: gram_distance(m[1:].t()), M)


def test_gradient_is_zero_where_the_rows_are_orthonormal():
    M = torch.eye(3, 5).requires_grad_()
    gram_distance(M).backward()
    assert torch.equal(M.grad, torch.zeros(3, 5))


def test_autocast_does_not_lower_its_precision():
    M = torch.randn(4, 33)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_distance(M), gram_distance(M.clone()))
    assert torch.allclose(gram_distance(M), plain(M))
