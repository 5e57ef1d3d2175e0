"""Packed weights of 8 and 4 bits: values, and products against sums in float64."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petl.ops import small_weights
from petl.ops.small_weights import (
    KINDS,
    SmallConv1D,
    SmallLinear,
    can_pack,
    pack,
    product,
    replace_weight,
)

pytestmark = pytest.mark.skipif(
    any(map(small_weights.why_unsupported, KINDS)), reason="no kernels for this processor"
)
# of a product that is rounded to bfloat16, which has 8 digits
ROUNDED = 2**-7


def weight_of(out: int, width: int) -> torch.Tensor:
    """A weight with rows of unlike sizes, one of zeros, and an offset."""
    rows = torch.linspace(0.01, 3, out)[:, None]
    weight = rows * torch.randn(out, width) + 0.1 * rows
    weight[3] = 0
    return weight


def values_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What the codes of a weight stand for, [O, I], read through the product with unit vectors."""
    return product(torch.eye(weight.shape[1]).bfloat16(), pack(weight, kind)).float().t()


def test_codes_of_8_bits_are_within_half_a_step_of_each_output():
    weight = weight_of(48, 40)
    step = weight.abs().amax(1, keepdim=True) / 127
    # the scale is rounded to 8 digits, by which the largest codes are cut; the value, too
    assert ((values_of(weight, "int8") - weight).abs() <= 1.02 * step + 1e-9).all()
    assert (values_of(weight, "int8")[3].abs() < 1e-30).all()


def test_codes_of_4_bits_are_within_half_a_step_of_each_group():
    weight = weight_of(48, 96)
    groups = weight.view(48, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    bound = (0.6 * step[..., None] + groups.abs().amax(-1, keepdim=True) * 2**-7).expand_as(groups)
    error = (values_of(weight, "int4") - weight).abs().view_as(groups)
    assert (error <= bound + 1e-9).all()
    assert error.mean() > 0.1 * step.mean()  # they are 4 bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 17, 70])  # by the kernel, and in dense blocks
def test_products_are_those_of_the_values(kind, rows, monkeypatch):
    monkeypatch.setattr(small_weights, "BLOCK", 20 * 64)  # several, and a shorter one at the end
    weight, x = weight_of(48, 64), torch.randn(rows, 64).bfloat16()
    y = product(x, pack(weight, kind))
    expected = x.double() @ values_of(weight, kind).double().t()
    scale = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    assert ((y - expected).abs() <= ROUNDED * scale + 1e-9).all()


@pytest.mark.parametrize(("made", "small"), [(nn.Linear, SmallLinear), (Conv1D, SmallConv1D)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_about_the_same_with_its_packed_weight(made, small, kind):
    layer = nn.Linear(64, 32) if made is nn.Linear else Conv1D(32, 64)
    layer.bias.data = torch.arange(32.0)
    x = torch.randn(2, 3, 64)
    before = layer(x)
    assert can_pack(layer, kind)
    replace_weight(layer, pack(small_weights.matrix_of(layer), kind))
    y = layer(x)
    assert type(layer) is small
    assert (y.shape, y.dtype) == ((2, 3, 32), torch.float32)
    norm = (before - layer.bias).norm()
    assert 1e-4 * norm < (y - before).norm() < (0.02 if kind == "int8" else 0.15) * norm
    assert layer.weight.dtype == torch.float32  # which some models read
    with pytest.raises(RuntimeError):  # and no values, which nothing may read
        nn.functional.linear(x, layer.weight)
    assert [*layer.state_dict()] == ["weight", "bias"]


def test_layers_that_no_kernel_takes_stay():
    class Own(nn.Linear):
        pass

    assert not can_pack(nn.Linear(64, 40), "int4")
    assert not can_pack(nn.Linear(48, 32), "int4")
    assert can_pack(nn.Linear(48, 40), "int8")
    assert not can_pack(Own(64, 32), "int8")
    assert not can_pack(nn.Embedding(64, 32), "int8")
    assert not can_pack(nn.Linear(64, 32, device="meta"), "int8")
