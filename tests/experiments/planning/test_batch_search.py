"""The largest batch that fits is found, and the search leaves no trace."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from petl.experiments.planning.batch_search import StepTrials, largest, restored
from petl.training.distributed.launch import StepEngine

CPU = torch.device("cpu")


@pytest.mark.parametrize("start", [1, 7, 32, 3000])
@pytest.mark.parametrize("hidden", [1, 2, 3, 19, 20, 21, 40, 333, 5000, 76_543])
def test_the_largest_size_is_found_within_a_twentieth_or_one(start, hidden):
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= hidden

    found = largest(fits, start, maximum=10**6)
    assert hidden == found or 0.95 * hidden - 1 < found < hidden
    assert len(set(asked)) == len(asked)
    assert len(asked) <= abs(math.log2(hidden / start)) + 1 + math.log2(20) + 2


def test_no_size_above_the_maximum_is_tried_and_none_may_fit():
    asked: list[int] = []
    assert largest(lambda n: asked.append(n) is None, 3, maximum=10) == 10
    assert asked == [3, 6, 10]
    assert largest(lambda n: False, 8, maximum=10) == 0


class Bounded(nn.Module):
    """Runs out of memory with more than `rows` rows, in the forward pass or in the backward."""

    def __init__(self, rows: int, where: str) -> None:
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.rows, self.where = rows, where

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        random.random(), np.random.rand()
        y = self.drop(self.norm(self.inner(x)))
        if len(x) > self.rows and self.where == "forward":
            raise torch.OutOfMemoryError("out of memory")
        if len(x) > self.rows:
            y.register_hook(self.fail)
        return SimpleNamespace(loss=y.square().mean())

    def fail(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    kept = [t.clone() for t in model.state_dict().values()]
    slots = [v.clone() for s in optimizer.state.values() for v in s.values()]
    draws = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(int))]
    return [*kept, *slots, *draws, torch.tensor(random.getstate()[1])]


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("hidden", [2, 37, 700])
def test_trials_find_a_hidden_size_and_restore_model_optimizer_and_random_states(
    hidden, where, trained_before
):
    model = Bounded(hidden, where).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = StepEngine(model, optimizer, 1.0, Accelerator(cpu=True))
    trials = StepTrials(engine)
    if trained_before:
        trials.step({"x": torch.randn(2, 4)})
    before = state_of(model, optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    with restored(model, optimizer, CPU):
        found = largest(lambda n: trials.fits({"x": torch.randn(n, 4)}), 16, maximum=5000)
        assert not torch.equal(model.inner.weight, before[0])  # steps were made
    assert 0.95 * hidden - 1 < found <= hidden
    after = state_of(model, optimizer)
    assert len(before) == len(after)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_that_is_not_about_memory_is_raised():
    model = Bounded(5, "forward")
    engine = StepEngine(model, torch.optim.AdamW(model.parameters()), 1.0, Accelerator(cpu=True))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        StepTrials(engine).fits({"x": torch.randn(2, 3)})
