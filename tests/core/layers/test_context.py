"""Auxiliary losses that add their own gradient during the backward pass."""

import pytest
import torch
from kept_processes import in_processes
from torch import distributed, nn
from torch._subclasses import FakeTensorMode

from petl.core.layers.context import ForwardContext, add_gradient


def test_add_gradient_is_the_identity_and_its_backward_reaches_the_term():
    y = torch.randn(3, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0])
    parameter = torch.tensor(2.0, requires_grad=True)
    scale = torch.tensor(0.25)
    found = add_gradient(y * 1, parameter**2, scale)
    assert torch.equal(found, y)
    (found * weight).sum().backward()
    assert torch.equal(y.grad, weight)
    assert float(parameter.grad) == 0.25 * 2 * 2.0


def test_add_gradient_does_not_depend_on_the_loss_that_is_used():
    y = torch.randn(3, requires_grad=True)
    parameter = torch.tensor(3.0, requires_grad=True)
    (add_gradient(y * 1, parameter * 1, torch.tensor(1.0)).sum() * 1000).backward()
    assert float(parameter.grad) == 1.0


class Model(nn.Module):
    """A layer with an auxiliary loss of twice its weight, and an output with a loss."""

    def __init__(self, context: ForwardContext) -> None:
        super().__init__()
        self.context = context
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.register_forward_pre_hook(context.begin, with_kwargs=True)
        self.register_forward_hook(context.end, with_kwargs=True)

    def forward(self, x, attention_mask=None, labels=None, num_items_in_batch=None):
        term = 2 * self.weight
        self.context.record("layer", term, load=self.weight)
        y = x if self.context.scale is None else add_gradient(x, term, self.context.scale)
        return {"loss": (y * self.weight).sum()}


def test_the_output_loss_has_the_value_of_the_term_in_training_only():
    context = ForwardContext()
    model = Model(context).train()
    x = torch.ones(2)
    assert float(model(x)["loss"]) == 6 + 6
    assert float(context.total()) == 6
    assert float(model.eval()(x)["loss"]) == 6
    with torch.no_grad():
        assert float(model.train()(x)["loss"]) == 6


def test_the_weight_scales_the_gradient_and_not_the_output_loss():
    context = ForwardContext()
    model = Model(context).train()
    context.aux_weight = 0.5
    loss = model(torch.ones(2))["loss"]
    assert float(loss) == 12
    loss.backward()
    assert float(model.weight.grad) == 2 + 0.5 * 2  # of x weight, and of the term


def test_items_in_the_batch_replace_the_weight():
    context = ForwardContext()
    context.aux_weight = 0.5
    model = Model(context).train()
    labels = torch.tensor([[1, -100, 3, 4]])
    items = torch.tensor(12)
    loss = model(torch.ones(2), labels=labels, num_items_in_batch=items)["loss"]
    assert float(loss) == 6 + 6 * 3 / 12
    loss.backward()
    assert float(model.weight.grad) == 2 + 2 * 3 / 12


def test_items_counted_over_processes_scale_the_term_by_their_number():
    """Trainer multiplies the loss by the processes, since DDP divides the gradient by them."""
    context = ForwardContext()
    context.item_processes = 4
    model = Model(context).train()
    model(torch.ones(2), labels=torch.tensor([[1, 2]]), num_items_in_batch=torch.tensor(8))
    assert float(context.scale) == 4 * 2 / 8


def test_shifted_labels_that_a_collator_made_are_counted_as_they_are():
    context = ForwardContext()
    given = {"labels": torch.tensor([[1, 2, 3]]), "shift_labels": torch.tensor([[2, -100, -100]])}
    context.begin(Model(ForwardContext()).train(), (), {**given, "num_items_in_batch": 4})
    assert float(context.scale) == 0.25


def test_the_mask_is_for_layers_with_as_many_tokens():
    context = ForwardContext()
    model = Model(context).train()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    model(torch.ones(2), attention_mask=mask)
    assert context.mask_of(6).tolist() == [1, 1, 0, 1, 0, 0]
    assert context.mask_of(5) is None
    model(torch.ones(2), attention_mask=mask[None, None])
    assert context.mask_of(6) is None


def test_terms_are_those_of_the_last_training_forward():
    context = ForwardContext()
    model = Model(context).train()
    for _ in range(3):
        model(torch.ones(2))
    model.eval()(torch.ones(2))
    assert float(context.total()) == 6
    assert {name: float(v) for name, v in context.series["load"].items()} == {"layer": 3.0}


def test_nothing_is_recorded_outside_a_forward():
    context = ForwardContext()
    context.record("layer", torch.tensor(1.0))
    assert float(context.total()) == 0


def test_evaluation_and_training_have_separate_states():
    context = ForwardContext()
    context.state["h"] = torch.ones(1)
    with torch.no_grad():
        assert not context.state
        context.state["h"] = torch.zeros(1)
    assert float(context.state["h"]) == 1


def test_terms_of_layers_on_several_devices_are_added():
    context = ForwardContext()
    with FakeTensorMode():  # needs no device
        layers = {place: torch.ones((), device=place) for place in ("xla:0", "xla:1")}
        context.recording = True
        for place, term in layers.items():
            context.record(place, term)
        loss = torch.ones((), device="xla:1")
        output = context.end(nn.Linear(1, 1), (), {}, {"loss": loss})
        total = context.total()
    assert total.device == torch.device("xla:0")
    assert output["loss"].device == torch.device("xla:1")


class Weighted(nn.Module):
    """A loss of 0, and a term whose weights follow from counts of all rows."""

    def __init__(self, context: ForwardContext) -> None:
        super().__init__()
        self.context, self.weight = context, nn.Parameter(torch.tensor(3.0))
        self.register_forward_pre_hook(context.begin, with_kwargs=True)
        self.register_forward_hook(context.end, with_kwargs=True)

    def forward(self, x):
        values = self.weight**2 * x.sum(0)
        term = self.context.weighted_term("layer", values, (x > 1).sum(0).float(), weigh)
        return {"loss": add_gradient(self.weight * 0, term, self.context.scale)}


def weigh(counts):
    return counts / counts.sum()


def gradient_of_one_process(rows, weights):
    """The gradient of a process on its rows, and the value of the term that it records."""
    rank = distributed.get_rank()
    context = ForwardContext()
    context.aux_weight = weights[rank]
    model = Weighted(context).train()
    model(rows[rank])["loss"].backward()
    return float(model.weight.grad), float(context.total())


@pytest.mark.parametrize("weights", [(0.6, 1.0), (0.5, 0.0)], ids=["unequal", "without rows"])
def test_a_weighted_term_of_two_processes_is_that_of_all_rows(weights):
    rows = [torch.tensor([[0.5, 2.0], [3.0, 4.0], [1.5, 0.0]]), torch.tensor([[5.0, 0.5]])]
    # a process with weight 0 has a row that does not count
    real = torch.cat([x for x, weight in zip(rows, weights, strict=True) if weight])
    gates = weigh((real > 1).sum(0).float())
    found = in_processes(2, gradient_of_one_process, rows, weights)
    mean = sum(gradient for gradient, _ in found) / 2
    expected = float((gates * real.sum(0)).sum())
    assert mean == pytest.approx(sum(weights) / 2 * 2 * 3 * expected)
    assert [value for _, value in found] == pytest.approx([9 * expected] * 2)


def test_after_some_rows_a_layer_has_all_of_them_again():
    context, mask = ForwardContext(), torch.tensor([[1, 1], [1, 0], [0, 1]])
    context.keep_mask(nn.Identity(), (), {"attention_mask": mask})
    with context.only_rows([2, 0], 3):
        assert torch.equal(context.token_mask(torch.ones(2, 2, 4)), mask[[2, 0]])
        with context.only_rows([1], 2):  # the second of the two
            assert torch.equal(context.token_mask(torch.ones(1, 2, 4)), mask[[0]])
    assert torch.equal(context.token_mask(torch.ones(3, 2, 4)), mask)
