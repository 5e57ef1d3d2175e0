"""Layers with the weights of several models, compared with torch's layers one by one."""

import pytest
import torch
from torch import nn

from petl.methods.families.stacked import layer_norm, linear


@pytest.mark.parametrize(("I", "O"), [(6, 3), (3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_stacked_linear_layers_are_independent(I, O, bias):
    layers, x = [nn.Linear(I, O, bias) for _ in range(3)], torch.randn(3, 4, I)
    biases = torch.stack([layer.bias for layer in layers]).unsqueeze(1) if bias else None
    found = linear(x, torch.stack([layer.weight for layer in layers]), biases)
    torch.testing.assert_close(found, torch.stack([f(x_) for f, x_ in zip(layers, x, strict=True)]))
    torch.testing.assert_close(linear(x, layers[0].weight, layers[0].bias), layers[0](x))


def test_stacked_norms_are_independent():
    norms, x = [nn.LayerNorm(6) for _ in range(3)], torch.randn(3, 4, 6)
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    weight, bias = (
        torch.stack([getattr(norm, name) for norm in norms]).unsqueeze(1)
        for name in ("weight", "bias")
    )
    expected = torch.stack([norm(x_) for norm, x_ in zip(norms, x, strict=True)])
    torch.testing.assert_close(layer_norm(x, weight, bias), expected)
    torch.testing.assert_close(layer_norm(x, norms[0].weight, norms[0].bias), norms[0](x))
