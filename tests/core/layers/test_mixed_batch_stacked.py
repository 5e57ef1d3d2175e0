"""Stacked adapters: which can be stacked, and that each group computes as its adapter."""

import pytest
import torch

from petl import testing
from petl.core.layers.mixed_batch import stacked
from petl.testing import Case

FORMS = {
    "adapter": {"r": 4},
    "adapter with norms": {"r": 4, "ln_before": True, "ln_after": True},
    "adapter, scaled": {"r": 4, "scaling": "learned", "use_bias": False},
    "adapter, half": {"r": 4, "scaling": 0.5, "residual": False},
    "adapter, parallel": {"r": 4, "placement": "parallel"},
    "adapter, residual stream": {"r": 4, "placement": "parallel_residual", "residual": True},
    "compacter": {"r": 4, "phm_rank": 2},
    "compacter, own rules": {"r": 4, "shared_phm_rule": False, "factorized_phm_rule": True},
    "compacter, low rank": {"r": 4, "projection": "lowrank"},
    "binary": {"inner": "adapter", "r": 4},
}


def model_of(form, *names, model="llama", **fields):
    case = Case(form.partition(",")[0].split()[0], model, FORMS[form] | fields).without_head()
    wrapped = testing.stir(case.wrap(adapter_name=names[0]), names[0])
    for seed, name in enumerate(names[1:]):
        wrapped.add_adapter(name, case.config())
        wrapped.set_adapter(name)
        testing.stir(wrapped, name, seed=seed + 3)
    return case, wrapped.eval()


def alone(model, batch, row, name):
    """Return the logits of a row alone, through its adapter or none."""
    own = {key: value[row : row + 1] for key, value in batch.items()}
    if name == "__base__":
        with model.disable_adapter():
            return testing.logits(model, own)[0]
    model.set_adapter(name)
    return testing.logits(model, own)[0]


@pytest.mark.cells(3)
@pytest.mark.parametrize("form", FORMS)
def test_networks_of_one_form_are_computed_together(form):
    case, model = model_of(form, "one", "two", "three")
    batch, names = case.batch(), ["three", "one", "__base__", "three"]
    expected = torch.stack([alone(model, batch, row, name) for row, name in enumerate(names)])
    assert testing.difference(testing.logits(model, batch, adapter_names=names), expected) < 1e-5
    layers = testing.tuner_layers(model).values()
    assert all(layer._batched(["three", "one"], torch.float32) is not None for layer in layers)


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("adapter", {"non_linearity": "relu"}),
        ("adapter", {"scaling": 0.5}),
        ("adapter", {"r": 8}),
        ("adapter", {"use_bias": False}),
        ("compacter", {"factorized_phm": False, "phm_rank": 1}),
    ],
)
def test_networks_of_several_forms_are_computed_one_by_one(form, fields):
    case, model = model_of(form, "one")
    other = Case(case.method, "llama", FORMS[form] | fields).without_head()
    model.add_adapter("two", other.config())
    model.set_adapter("two")
    testing.stir(model, "two", seed=3)
    batch, names = case.batch(), ["two", "one", "__base__", "two"]
    expected = torch.stack([alone(model.eval(), batch, i, name) for i, name in enumerate(names)])
    assert testing.difference(testing.logits(model, batch, adapter_names=names), expected) < 1e-5
    layer = next(iter(testing.tuner_layers(model).values()))
    assert layer._batched(["one", "two"], torch.float32) is None


@pytest.mark.parametrize("fields", [{"block": "conformer"}])
def test_convolutions_are_computed_one_by_one(fields):
    case = Case("adapter", "vit", {"r": 4, **fields}).without_head()
    layer = next(iter(testing.tuner_layers(case.wrap_stirred().eval()).values()))
    assert layer._batched(["default", "default"], torch.float32) is None


def test_a_stack_has_each_groups_tensors_and_no_parameter():
    _, model = model_of("compacter", "one", "two")
    layer = next(iter(testing.tuner_layers(model).values()))
    a, b = (layer.adapters[name] for name in ("one", "two"))
    batched = stacked([a, b, a], torch.float32)
    assert not list(batched.parameters())
    for name, tensor in a.named_parameters():
        expected = torch.stack([tensor, dict(b.named_parameters())[name], tensor])
        assert torch.equal(getattr(batched, name).view_as(expected), expected)
    rules = [adapter.info.shared.rule for adapter in (a, b, a)]
    assert torch.equal(batched.info.shared.rule, torch.stack(rules))
    assert a.info.shared is not batched.info.shared
