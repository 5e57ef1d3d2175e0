"""The lifecycle through which a loop drives methods and extra losses."""

import pytest
import torch
from torch import nn

import petl
from petl import testing
from petl.testing import Case


def test_every_call_works_for_a_method_without_hooks():
    model = petl.wrap(testing.tiny_llama(), "lora", target_modules=["q_proj"])
    life = petl.lifecycle(model)
    life.aux_weight = 0.5
    life.prepare([])
    life.after_step(1, None)
    life.load_state_dict(life.state_dict())
    assert life.metrics() == {}
    assert not life.has_aux
    assert float(life.aux_loss()) == 0


def test_the_lifecycle_of_a_wrapped_model_is_found():
    model = petl.wrap(testing.tiny_llama(), "mola")
    ddp = nn.DataParallel(model)
    pipeline = nn.Sequential(ddp, nn.Linear(2, 2))  # as in sentence-transformers
    for outer in (model, ddp, pipeline):
        assert petl.lifecycle(outer).tuner is model.base_model


def test_the_weight_of_auxiliary_losses_can_be_read():
    life = petl.lifecycle(petl.wrap(testing.tiny_llama(), "mola"))
    assert life.aux_weight == 1.0
    life.aux_weight = 0.25
    assert life.aux_weight == 0.25
    assert life.parts[0].context.aux_weight == 0.25


def test_metrics_are_floats_of_the_last_training_forward():
    case = Case("mola", "llama")
    model = case.wrap().train()
    life = petl.lifecycle(model)
    assert life.metrics() == {}
    assert not life.has_aux
    model(**case.batch())
    assert life.has_aux
    figures = life.metrics()
    assert figures["aux_loss"] == pytest.approx(float(life.aux_loss()))
    assert all(type(value) is float for value in figures.values())


def test_adalora_prunes_its_ranks_on_schedule():
    fields = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 8}
    case = Case("adalora", "llama", {**fields, "target_modules": ["q_proj"]})
    model = case.wrap().train()
    life = petl.lifecycle(model)
    optimizer = torch.optim.AdamW(testing.trainable(model).values(), lr=1e-2)
    kept = []
    for step in range(1, 9):
        model(**case.batch()).loss.backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
        values = [p for n, p in model.named_parameters() if "lora_E" in n]
        kept.append(sum(int(torch.count_nonzero(p)) for p in values))
    assert kept[-1] == 2 * 3
    assert max(kept) > kept[-1]


def test_a_method_gets_the_step_and_the_optimizer():
    model = petl.wrap(testing.tiny_llama(), "mos", r=4)
    calls = []

    class Changing(type(petl.method("mos"))):
        def after_step(self, t):
            calls.append((t.step, t.optimizer, t.names))

    class Tuner(type(model.base_model)):
        method = Changing()

    model.base_model.__class__ = Tuner
    optimizer = object()
    petl.lifecycle(model).after_step(3, optimizer)
    assert calls == [(3, optimizer, ["default"])]


@pytest.mark.parametrize("method", ["lora", "mola", "increlora", "sparse"])
@pytest.mark.parametrize("optimizer", [None, 7, "adam"])
def test_what_is_no_optimizer_is_refused(method, optimizer):
    life = petl.lifecycle(petl.wrap(testing.tiny_llama(), method))
    with pytest.raises(petl.InputError, match="the optimizer"):
        life.attach_optimizer(optimizer)


@pytest.mark.parametrize("method", ["lora", "mola", "increlora", "sparse"])
@pytest.mark.parametrize(
    "state",
    [
        {"stranger": torch.ones(1)},
        {"coming": torch.ones(3), "stranger": torch.ones(1)},
        {"default.step": "soon"},
        {"default.step": torch.tensor(float("inf"))},
        {3: 4},
        None,
        [1],
    ],
)
def test_the_state_of_another_method_is_refused(method, state):
    life = petl.lifecycle(petl.wrap(testing.tiny_llama(), method))
    with pytest.raises(petl.InputError, match="training state"):
        life.load_state_dict(state)


def test_adalora_has_the_ranks_of_pefts_own_loop():
    fields = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12}
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = petl.wrap(testing.tiny_llama(), "adalora", target_modules=["q_proj"], **fields)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids, ranks = torch.arange(1, 13).view(2, 6), []
        for step in range(12):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if ours:
                petl.lifecycle(model).after_step(step + 1, optimizer)
            else:  # as in its documentation, which counts from 0
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            ranks.append([int((p != 0).sum()) for n, p in model.named_parameters() if "_E" in n])
        found.append(ranks)
    assert found[0] == found[1]
    assert found[0][0] != found[0][-1]
