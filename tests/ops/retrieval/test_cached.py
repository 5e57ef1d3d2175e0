"""Gradients in slices: those of the whole batch, with dropout as well."""

import pytest
import torch
from torch import nn

import petl
from petl.ops.retrieval import cached_step, in_batch

B = 10


class Encoder(nn.Module):
    """A linear layer with dropout; counts the rows of each call."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 4)
        )
        self.sizes = []

    def forward(self, column):
        self.sizes.append(len(column["x"]))
        return self.layers(column["x"])


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradients_are_those_of_the_whole_batch(dropout):
    model = Encoder(dropout).double()
    columns = [{"x": torch.randn(B, 5, dtype=torch.float64)} for _ in range(2)]
    torch.manual_seed(3)
    value = cached_step(model, columns, in_batch, rows=4)
    after = torch.rand(1)
    found = gradients(model)
    assert model.sizes == [4, 4, 2] * 4
    torch.manual_seed(3)  # the same masks, drawn in the same slices, with the whole graph
    parts = [torch.cat([model({"x": x}) for x in column["x"].split(4)]) for column in columns]
    loss = in_batch(*parts)
    assert torch.rand(1) == after
    loss.backward()
    assert value == pytest.approx(loss.item(), abs=1e-12)
    for one, other in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_a_column_that_the_loss_does_not_use_has_no_gradient():
    model = Encoder(0.0)
    columns = [{"x": torch.randn(B, 5)} for _ in range(3)]
    cached_step(model, columns, lambda q, p, _: in_batch(q, p), rows=5)
    assert len(model.sizes) == 2 * 3 + 2 * 2


def test_it_is_a_public_package():
    assert petl.retrieval.cached_step is cached_step
