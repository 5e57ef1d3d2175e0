"""A wrap that fails half-way leaves the model as it was, whichever method it is."""

import contract_cases
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from unchanged import everything

import petl
from petl.errors import InputError
from petl.testing import Case


def case_of(name: str) -> Case:
    """The contract's case of a method."""
    if petl.method(name).own:
        return contract_cases.own(name, contract_cases.models_of(name)[0])
    return contract_cases.adopted(name, "llama")


def assert_failed_wrap_changes_nothing(model: nn.Module, wrap) -> None:
    next(model.parameters()).requires_grad_(False)
    before, weights = everything(model), {k: t.clone() for k, t in model.state_dict().items()}
    wrap(model)
    assert everything(model) == before
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


@pytest.mark.cells(13)
@pytest.mark.parametrize("name", petl.list_methods())
def test_an_error_after_all_layers_are_adapted_changes_nothing(name, monkeypatch):
    case = case_of(name)

    # PEFT calls it when all layers are there
    def fail(*args: object) -> None:
        raise ValueError("late")

    monkeypatch.setattr(case.promises.tuner, "_mark_only_adapters_as_trainable", fail)

    def wrap(model: nn.Module) -> None:
        with pytest.raises(ValueError, match="late"):
            case.wrap(model)

    assert_failed_wrap_changes_nothing(case.base(), wrap)


@pytest.mark.parametrize(("name", "field"), [("c3a", "block_size"), ("fourierft", "n_frequency")])
def test_a_size_that_fits_all_layers_but_the_last_changes_nothing(name, field):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))
    model.model.layers[1].mlp.down_proj = nn.Linear(31, 31)

    def wrap(model: nn.Module) -> None:
        value = {"block_size": 16, "n_frequency": 1000}[field]
        with pytest.raises(InputError):
            petl.wrap(model, name, target_modules="block-linear", **{field: value})

    assert_failed_wrap_changes_nothing(model, wrap)
