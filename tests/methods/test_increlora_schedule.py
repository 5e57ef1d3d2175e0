"""IncreLoRA's growth schedule, and its warnings for trainings that are too short."""

import copy
import re
from typing import Any

import pytest
import torch
from increlora_fixtures import backward, grows, trained, wrap
from safetensors.torch import load_file
from torch import nn

import petl
from petl.errors import InputError
from petl.methods.increlora import active_layers, active_parameters, growth_finished, rank_pattern
from petl.methods.increlora.method import RATES
from petl.testing import tiny_llama


def test_attach_optimizer_needs_the_length_of_the_training():
    model = wrap(total_step=None)
    tuner: Any = model.base_model
    optimizer = torch.optim.AdamW(trained(model))
    with pytest.raises(InputError):
        tuner.attach_optimizer(optimizer)
    petl.lifecycle(model).attach_optimizer(optimizer, total_steps=9)
    with pytest.raises(InputError):
        tuner.attach_optimizer(torch.optim.SGD([nn.Parameter(torch.zeros(2))]), total_steps=9)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (3, "no rank will grow: the first growth step is 3, but the training ends after"),
        (7, "ranks will not reach their target: the last of 3 growth steps is 9, but the training"),
        (7, "ends after step 7; use tinit=1 and deltaT=1, with which all 3"),
        (4, "ends after step 4; use a larger top_h or rank_step"),
    ],
)
def test_a_training_too_short_for_the_growth_warns(total, message, caplog):
    wrap(total_step=total)
    assert message in caplog.text
    caplog.clear()
    petl.lifecycle(model := wrap(total_step=None)).attach_optimizer(
        torch.optim.SGD(trained(model), lr=0.1), total_steps=total
    )
    assert message in caplog.text


@pytest.mark.parametrize("total", [5, 23, 60, 375])
def test_the_settings_that_the_warning_suggests_make_all_growth_steps_fit(total, caplog):
    wrap(tinit=100, deltaT=100, total_step=total)
    advised = {key: int(value) for key, value in re.findall(r"(tinit|deltaT)=(\d+)", caplog.text)}
    caplog.clear()
    model = wrap(**advised, total_step=total)
    assert not caplog.text
    for step in range(1, total):
        model.base_model.update_and_allocate(step)
    assert growth_finished(model)


@pytest.mark.parametrize(("tinit", "events"), [(None, [14, 21, 28]), (10, [12, 18, 24])])
def test_without_deltaT_growth_ends_after_35_percent_of_the_training(tinit, events):
    model = wrap(tinit=tinit, deltaT=None, total_step=81)  # 28 steps for three growth steps
    assert [step for step in range(1, 82) if grows(model, step)] == events
    assert growth_finished(model)


def test_an_adapter_at_its_parameter_budget_has_finished_growing_and_saves_a_compact_file(tmp_path):
    base = wrap()
    smallest = min(sum(layer.shape) + 1 for layer in active_layers(base).values())
    budget = 2 * sum(sum(layer.shape) + 1 for layer in active_layers(base).values())
    model = wrap(target_total_rank=None, target_r=2, parameter_budget=budget)
    tuner: Any = model.base_model
    for step in range(1, 40):
        backward(model, step)
        tuner.update_and_allocate(step)
    assert growth_finished(model)
    assert budget - smallest < active_parameters(model) <= budget
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rows = sum(t.shape[0] for name, t in saved.items() if name.endswith("lora_A"))
    assert rows == sum(rank_pattern(model).values())
    back = petl.load(tiny_llama(2), tmp_path, is_trainable=True)
    assert growth_finished(back)
    assert rank_pattern(back) == rank_pattern(model)


def test_warnings_name_the_consequence(caplog):
    model = wrap()
    assert not caplog.text
    model.base_model.update_and_allocate(3)
    assert "attach_optimizer was not called" in caplog.text
    caplog.clear()
    model = wrap()
    model.base_model.attach_optimizer(torch.optim.Adagrad(trained(model)))
    assert "Adagrad: components added during training have their own learning rates" in caplog.text


def test_copies_of_a_model_are_not_attached_to_an_optimizer():
    model = wrap()
    optimizer = torch.optim.AdamW(trained(model))
    model.base_model.attach_optimizer(optimizer)
    twin = copy.deepcopy(model)
    assert not twin.base_model.kept[RATES].handles
    assert model.base_model.kept[RATES].handles
    model.base_model.attach_optimizer(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
