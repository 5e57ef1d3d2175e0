"""A masked linear layer with low-rank update and single entries, against dense matrices."""

import pytest
import torch
from torch.nn import functional as F

from petl.methods.dsee.entries import (
    Frozen,
    SparseUpdate,
    add_update,
    masked_weight,
    updated_linear,
)
from petl.ops.masks import pack_mask

O, I, R, SCALE = 6, 5, 2, 0.7
POSITIONS = torch.tensor([0, 3, 8, 9, 27, 29])  # rows and columns with several entries


def parts(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 4, I), "A": (R, I), "B": (O, R), "values": (6,)}
    leaves = {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    weight, bias = (torch.randn(s, generator=generator, dtype=dtype) for s in ((O, I), (O,)))
    keep = torch.rand(O, I, generator=generator) > 0.4
    return leaves, weight, bias, keep


def update_of(leaves):
    A, B, values = (leaves[name] for name in ("A", "B", "values"))
    return SparseUpdate(A, B, values, POSITIONS // I, POSITIONS % I, SCALE)


def dense(leaves, weight, bias, keep):
    S = [[0.0] * I for _ in range(O)]
    for value, position in zip(leaves["values"], POSITIONS.tolist(), strict=True):
        S[position // I][position % I] = value
    S = torch.stack([torch.stack([torch.as_tensor(v).to(weight) for v in row]) for row in S])
    D = SCALE * (leaves["B"] @ leaves["A"] + S)
    return F.linear(leaves["x"], weight * keep + D, bias), D


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("keeps_product", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_output_and_gradients_are_those_of_a_dense_weight(is_masked, keeps_product, is_fused):
    leaves, weight, bias, keep = parts()
    keep = keep if is_masked else torch.ones_like(keep)
    x = leaves["x"]
    update = SparseUpdate(
        *(leaves[n] for n in ("A", "B", "values")), POSITIONS // I, POSITIONS % I, SCALE
    )
    packed = pack_mask(keep) if is_masked else None
    if is_fused:
        kept = weight * keep if keeps_product else None
        y = updated_linear(x, Frozen(weight, bias, packed, kept), update)
    else:
        y = add_update(F.linear(x, masked_weight(weight, packed), bias), x, update)
    expected, D = dense(leaves, weight, bias, keep)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(update.dense(), D)
    gradient = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    found, wanted = (
        torch.autograd.grad(each, list(leaves.values()), gradient) for each in (y, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_without_an_update_only_the_input_gets_a_gradient():
    leaves, weight, bias, keep = parts()
    x = leaves["x"]
    y = updated_linear(x, Frozen(weight, bias, pack_mask(keep)), None)
    torch.testing.assert_close(y, F.linear(x, weight * keep, bias))
    (found,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(found, (weight * keep).sum(0).expand(x.shape))


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    leaves, weight, bias, keep = parts()
    update = SparseUpdate(
        *(leaves[n] for n in ("A", "B", "values")), POSITIONS // I, POSITIONS % I, SCALE
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        updated_linear(leaves["x"], Frozen(weight, bias, pack_mask(keep)), update)
    given = {weight.data_ptr(), leaves["x"].data_ptr()}
    assert not [t for t in kept if t.numel() >= O * I and t.data_ptr() not in given]
