"""Per-component learning rates of IncreLoRA."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from increlora_fixtures import STEPS, backward, layers, train, trained, wrap
from torch import Tensor, nn

import petl
from petl.methods.increlora import growth_finished
from petl.testing import tiny_llama


def lr_fraction(step: int, end: int, warmup: int) -> float:
    """The published scheduler's lambda after `steps` steps of a parameter group."""
    if step < 0:
        return 0.0
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (end - step) / max(1, end - warmup))


def components(layer: Any) -> list[tuple[str, int, Tensor, Tensor | None]]:
    """Tensor name, index, values and gradient of each component."""
    found = []
    for i in range(len(layer.E)):
        for kind, tensor, index in (
            ("A", layer.lora_A, (i,)),
            ("B", layer.lora_B, (slice(None), i)),
            ("E", layer.E, (i,)),
        ):
            grad = None if tensor.grad is None else tensor.grad[index].clone()
            found.append((kind, i, tensor.detach()[index].clone(), grad))
    return found


def lr_of(began: int, done: int, now: float, lr: float, warmup: int) -> float:
    """Learning rate after `done` steps of a component created at step `began`, from 0."""
    if began < 0:
        return 0.0
    return now if began == 0 else lr * lr_fraction(done - began - 1, STEPS - began - 1, warmup)


def start_of(layer: Any, kind: str, i: int) -> int:
    return int(layer.steps[1 if kind == "E" else 0, i])


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("order", "warmup"),
    [("allocate, step", 0), ("step, allocate", 2), ("lifecycle", 0), ("lifecycle", 2)],
)
def test_each_component_has_its_own_learning_rate_under_sgd(order, warmup):
    model = wrap(warmup_steps=warmup)
    tuner: Any = model.base_model
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lr_fraction(t, STEPS, warmup))
    lifecycle = petl.lifecycle(model)
    (lifecycle if order == "lifecycle" else tuner).attach_optimizer(optimizer)
    for t in range(STEPS):
        backward(model, t)
        kept = {key: components(layer) for key, layer in layers(model).items()}
        now = optimizer.param_groups[0]["lr"]
        if order == "allocate, step":
            tuner.update_and_allocate(t)
        optimizer.step()
        for key, layer in layers(model).items():
            for (kind, i, old, grad), (_, _, new, _) in zip(
                kept[key], components(layer), strict=True
            ):
                began = start_of(layer, kind, i)
                if order == "lifecycle" and began > 0:
                    began -= (
                        1  # the authors' counter is 3 after the third step, ours after the fourth
                    )
                lr = lr_of(began, t, now, 0.5, warmup)
                torch.testing.assert_close(new, old - lr * grad, rtol=1e-5, atol=1e-7)
        if order == "step, allocate":
            tuner.update_and_allocate(t)
        elif order == "lifecycle":
            lifecycle.after_step(t + 1, optimizer)
        optimizer.zero_grad()
        schedule.step()
    assert growth_finished(model)


@pytest.mark.thorough
def test_each_new_component_trains_like_under_an_adamw_of_its_own():
    model = wrap(warmup_steps=1)
    tuner: Any = model.base_model
    lr, betas, decay = 0.02, (0.8, 0.95), 0.1
    kind_of_adam = partial(torch.optim.AdamW, lr=lr, betas=betas, weight_decay=decay, eps=1e-14)
    optimizer = kind_of_adam(trained(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lr_fraction(t, STEPS, 1))
    tuner.attach_optimizer(optimizer)
    objects = trained(model)
    own: dict[tuple[str, str, int], Any] = {}
    late = 0
    for t in range(STEPS):
        backward(model, t)
        now = optimizer.param_groups[0]["lr"]
        expected = {}
        for key, layer in layers(model).items():
            for kind, i, old, grad in components(layer):
                began = start_of(layer, kind, i)
                if began < 0:
                    expected[key, kind, i] = old
                    continue
                if (key, kind, i) not in own:  # a new parameter and optimizer for a new component
                    alone = nn.Parameter(old.clone())
                    own[key, kind, i] = alone, kind_of_adam([alone])
                    late += began > 0
                alone, adam = own[key, kind, i]
                adam.param_groups[0]["lr"] = lr_of(began, t, now, lr, 1)
                alone.grad = grad
                adam.step()
                expected[key, kind, i] = alone.detach()
        optimizer.step()
        for key, layer in layers(model).items():
            for kind, i, new, _ in components(layer):
                torch.testing.assert_close(new, expected[key, kind, i], rtol=1e-4, atol=1e-6)
        tuner.update_and_allocate(t)
        optimizer.zero_grad()
        schedule.step()
    assert late > 20
    assert len(optimizer.param_groups) == 1
    assert all(a is b for a, b in zip(trained(model), objects, strict=True))


def test_a_further_training_moves_the_components_of_an_earlier_one(tmp_path):
    model = wrap(total_step=None, restart_warmup=True)
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    petl.lifecycle(model).attach_optimizer(optimizer, total_steps=STEPS)
    train(model, range(1, STEPS + 1), optimizer)
    assert max(int(layer.steps.max()) for layer in layers(model).values()) > 3
    model.save_pretrained(tmp_path)
    # shorter than the first training, after whose end no component was added
    again = petl.load(tiny_llama(2), tmp_path, is_trainable=True).train()
    optimizer = torch.optim.SGD(trained(again), lr=0.5)
    petl.lifecycle(again).attach_optimizer(optimizer, total_steps=2)
    kept = {key: components(layer) for key, layer in layers(again).items()}
    train(again, range(1, 2), optimizer)
    for key, layer in layers(again).items():
        for before, after in zip(kept[key], components(layer), strict=True):
            assert not torch.equal(before[2], after[2]), (key, *before[:2])


def test_inactive_rows_do_not_decay():
    model = wrap()
    tuner: Any = model.base_model
    optimizer = torch.optim.AdamW(trained(model), lr=0.1, weight_decay=0.5)
    tuner.attach_optimizer(optimizer)
    first = next(iter(layers(model).values()))
    kept = copy.deepcopy(first.lora_A.data), copy.deepcopy(first.E.data)
    backward(model, 0)
    optimizer.step()
    assert torch.equal(first.lora_A[2:], kept[0][2:])
    assert not torch.equal(first.lora_A[:2], kept[0][:2])
    assert torch.equal(first.E[1:], kept[1][1:])
