"""The first components of an update, compared with slices, a product and autograd."""

import pytest
import torch

from petl.methods.increlora.components import first_components

C, LIVE, REST = 5, 2, 1e-3


def tensors():
    shapes = (C, 4), (3, C), (C, 1)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def plain(A, B, E, count):
    rest = torch.full((count - LIVE, 1), REST, dtype=A.dtype)
    return torch.cat([E[:LIVE], rest]) * A[:count], B[:, :count]


@pytest.mark.parametrize("count", [LIVE, 4, C])
def test_values_and_gradients_are_those_of_slices_and_a_product(count):
    own = tensors()
    found = first_components(*own, LIVE, count, rest=REST)
    for one, other in zip(found, plain(*own, count), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(first_components(*own, LIVE, count, rest=REST)[0], found[0])
    assert torch.autograd.gradcheck(lambda *t: first_components(*t, LIVE, count, rest=REST), own)
    assert torch.autograd.gradgradcheck(
        lambda *t: first_components(*t, LIVE, count, rest=REST), own
    )


def test_a_pull_is_added_to_the_gradients_of_the_rows_in_use():
    own, count = tensors(), 4
    to_A, to_B = torch.randn(count, 4).double(), torch.randn(3, count).double()
    pull = (to_A, to_B, torch.tensor(0.5), 3.0)
    grads = []
    for given in (None, pull):
        rows, columns = first_components(*own, LIVE, count, rest=REST, pull=given)
        loss = (rows**2).sum() + (columns**3).sum()
        grads.append(torch.autograd.grad(loss, own))
    more_A, more_B, more_E = (b - a for a, b in zip(*grads, strict=True))
    assert torch.allclose(more_A[:count], 1.5 * to_A)
    assert not more_A[count:].any()
    assert torch.allclose(more_B[:, :count], 1.5 * to_B)
    assert not more_B[:, count:].any()
    assert not more_E.any()
