"""Training loops that never call the update of a method are told what they need."""

from typing import Any

import pytest
import torch

import petl
from petl.testing import tiny_llama
from petl.testing.case import trainable
from petl.testing.models import causal_batch


def train(name: str, *, driven: str = "", **fields: Any) -> None:
    model = petl.wrap(tiny_llama(2), name, **fields).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    tuner: Any = model.base_model
    for step in range(1, 5):
        model(**causal_batch(2, seed=step)).loss.backward()
        optimizer.step()
        if driven == "lifecycle":
            petl.lifecycle(model).after_step(step, optimizer)
        elif driven:
            tuner.update_and_allocate(step, optimizer)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sparse", "increlora"])
def test_a_loop_without_updates_is_warned_once(name, caplog):
    train(name, total_step=100)
    assert caplog.text.count("without an update, so it selects nothing") == 1
    assert "petl.lifecycle(model).after_step(step, optimizer)" in caplog.text


@pytest.mark.parametrize("driven", ["lifecycle", "itself"])
@pytest.mark.parametrize("name", ["sparse", "increlora"])
def test_a_loop_with_updates_is_not(name, driven, caplog):
    train(name, driven=driven, total_step=100)
    assert "without an update" not in caplog.text


def test_nor_is_one_whose_method_selects_nothing(caplog):
    train("sparse", selection_algorithm="none")
    train("mola")
    assert "without an update" not in caplog.text
