"""Distances of rows from orthonormality, compared with autograd on the formula."""

import torch

from petl.methods.increlora.adapter import gram_distances


def plain(M):
    return torch.linalg.matrix_norm(M @ M.t() - torch.eye(len(M), dtype=M.dtype))


def test_values_and_gradients_of_several_shapes_equal_the_formula():
    shapes = [(4, 7), (2, 7), (4, 7), (3, 5), (4, 7), (7, 4)]
    matrices = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    norms, slopes = gram_distances([*matrices[:-1], matrices[-1].t()])
    slopes[-1] = slopes[-1].t()
    for M, norm, slope in zip(matrices, norms, slopes, strict=True):
        expected = plain(M.t() if M is matrices[-1] else M)
        assert torch.allclose(norm, expected)
        assert not norm.requires_grad
        assert torch.allclose(slope, torch.autograd.grad(expected, M)[0])


def test_gradient_is_zero_where_the_rows_are_orthonormal():
    assert torch.equal(gram_distances([torch.eye(3, 5)])[1][0], torch.zeros(3, 5))


def test_autocast_does_not_lower_their_precision():
    M = torch.randn(4, 33)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,), _ = gram_distances([M])
    assert torch.equal(inside, gram_distances([M])[0][0])
    assert torch.allclose(inside, plain(M))
