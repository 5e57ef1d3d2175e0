"""Time and savings of a plan."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training_fixtures import Tiny

from petl.experiments.planning.cost import CachedStates, Time, time_of
from petl.experiments.planning.dry_run import PassMemory, pass_memory
from petl.experiments.planning.memory import Memory
from petl.experiments.planning.plan import plan_run
from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]
CPU = torch.device("cpu")
MEMORY = Memory(
    weights=100,
    optimizer=10,
    gradients=0,
    unfolded=0,
    pass_=PassMemory(800, 1000, operations=600),
    rows=4,
    tokens=5,
    scoring=PassMemory(0, 300, operations=80),
    scoring_rows=8,
    scoring_tokens=1,
)


class Product(nn.Module):
    """One product of [rows, 8] x [8, 3], and its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> nn.Module:
        self.loss = self.layer(x).sum()
        return self


def test_operations_are_counted():
    model = Product()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, parameter in model.layer.named_parameters():
            setattr(model.layer, name, nn.Parameter(torch.empty_like(parameter)))
        forward = pass_memory(model, {"x": torch.empty(5, 8)}, CPU, trains=False)
        both = pass_memory(model, {"x": torch.empty(5, 8)}, CPU)
    assert forward.operations == 2 * 5 * 8 * 3
    assert both.operations == 2 * forward.operations  # and the gradient of the weight


def test_time_follows_from_operations_per_position(monkeypatch):
    monkeypatch.setattr("petl.experiments.planning.cost.products_per_second", lambda *_: 60.0)
    # 600 / (4 x 5) = 30 operations a token in training, 80 / 8 = 10 in scoring
    assert time_of(MEMORY, 200, 12, (2, 2), CPU) == Time(100.0, 2.0, 60.0, 60.0)
    without = replace(MEMORY, scoring=None)
    assert time_of(without, 200, 12, (2, 2), CPU) == Time(100.0, 2.0, 60.0, 60.0)  # a third: 10
    assert time_of(replace(MEMORY, pass_=None), 200, 12, (2, 2), CPU) is None


def test_a_store_leaves_the_upper_blocks_and_is_filled_once(monkeypatch):
    monkeypatch.setattr("petl.experiments.planning.cost.products_per_second", lambda *_: 60.0)
    # frozen blocks take 6 of the 30 operations of a token in training, and of the 10 in scoring
    stored = time_of(MEMORY, 200, 12, (2, 2), CPU, stored=CachedStates(0.2, 50))
    assert stored == Time(
        steps=200 * 24 / 60, scoring=12 * 4 / 60, speed=60.0, speed_bf16=60.0, filling=50 * 6 / 60
    )
    # without more work than there is
    assert time_of(MEMORY, 200, 12, (2, 2), CPU, stored=CachedStates(0.5, 0)).scoring == 0


def test_time_is_that_of_products_in_the_precision_of_the_run(monkeypatch):
    def speed(rows, shape, device, dtype=torch.float32):
        return 60.0 if dtype == torch.float32 else 120.0

    monkeypatch.setattr("petl.experiments.planning.cost.products_per_second", speed)
    assert time_of(MEMORY, 200, 12, (2, 2), CPU) == Time(100.0, 2.0, 60.0, 120.0)
    assert time_of(MEMORY, 200, 12, (2, 2), CPU, bf16=True) == Time(50.0, 1.0, 60.0, 120.0)


def test_an_evaluation_needs_weights_optimizer_and_a_forward_pass():
    assert MEMORY.scoring_total == 100 + 10 + 300
    assert replace(MEMORY, scoring=None).scoring_total is None


@pytest.mark.thorough
def test_the_time_of_a_plan_with_a_store_is_that_of_its_parts(tiny: Tiny, monkeypatch):
    monkeypatch.setattr("petl.experiments.planning.cost.products_per_second", lambda *_: 1.0)
    # fewer steps than an epoch has: the store is filled for all rows nevertheless
    words = ["+method=lora", "method.layers_to_transform=top:1", "train.steps=2"]
    off, on = (
        plan_run(compose([*tiny.steady, *words, f"train.cache_frozen={value}"]))
        for value in ("false", "true")
    )
    frozen, memory = on.frozen, on.memory
    each = memory.pass_.operations / (memory.rows * memory.tokens)
    assert frozen.missing == frozen.bytes
    # a position has 32 values in float32; a row a key, an offset, a number and a checksum
    rows = on.length.rows + 20
    assert frozen.unfilled == (frozen.bytes - rows * (16 + 8 + 8)) / (4 * 32)
    assert off.time.filling == 0
    assert on.time.filling == pytest.approx(frozen.unfilled * each * frozen.saved)
    assert on.time.filling > on.time.steps
    assert on.time.steps == pytest.approx(off.time.steps * (1 - frozen.saved))
    scored = off.time.scoring / (
        memory.scoring.operations / memory.scoring_rows / memory.scoring_tokens
    )
    assert off.time.scoring - on.time.scoring == pytest.approx(scored * each * frozen.saved)
