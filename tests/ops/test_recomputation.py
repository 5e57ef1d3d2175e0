"""A recomputed function has the values and gradients of the plain one, and keeps its inputs."""

import pytest
import torch
from torch.nn import functional as F

from petl.ops.recomputation import recomputed


def network(x, W, b):
    return F.linear(x, W).sin() * b


@pytest.mark.parametrize("half", [False, True])
def test_values_and_gradients_are_those_of_the_function(half):
    torch.manual_seed(0)
    x, W, b = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True), torch.ones(5)
    b.requires_grad_()
    found = []
    for call in (network, lambda *tensors: recomputed(network, *tensors)):
        W.grad = b.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = call(x, W, b)
        (y.float() ** 2).sum().backward()  # outside of autocast, as trainers do
        found.append((y.detach(), W.grad, b.grad))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_only_the_inputs_are_kept():
    W, x, saved = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3), []
    b = torch.randn(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        recomputed(network, x, W, b)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, W, b)}
    with torch.no_grad():
        assert not recomputed(network, x, W, b).requires_grad
