"""The time of a run, from counted operations and the speed of this machine."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from petl.planning.memory import Memory

MEASURED = 0.1  # seconds that the matrix products are measured for
GROWTH = 3  # a training pass computes some three times as much as a forward pass


@dataclass(frozen=True)
class Time:
    """Estimated seconds on this machine.

    Attributes:
        steps: of all optimizer steps.
        scoring: of one evaluation of the test examples.
        speed: measured operations per second, in float32.
        speed_bf16: the same in bfloat16.
    """

    steps: float
    scoring: float
    speed: float
    speed_bf16: float


def time_of(
    memory: Memory,
    positions: float,
    scored: float,
    shape: tuple[int, int],
    device: torch.device,
    *,
    bf16: bool = False,
) -> Time | None:
    """Return the estimated time of a run; None if no pass could be planned.

    Args:
        memory: its passes have the number of operations.
        positions: computed in all steps: tokens with padding, images or clips.
        scored: the same, of the test examples.
        shape: [O, I] of the weight whose products are measured.
        device: that of the run.
        bf16: its products are in bfloat16.
    """
    if memory.pass_ is None:
        return None
    rows = positions_of(memory.rows, memory.tokens)
    speed = products_per_second(rows, shape, device)
    speed_bf16 = products_per_second(rows, shape, device, torch.bfloat16)
    each, forward = operations_of(memory)
    own = speed_bf16 if bf16 else speed
    return Time(positions * each / own, scored * forward / own, speed, speed_bf16)


def operations_of(memory: Memory) -> tuple[float, float]:
    """Return the operations of a position in a training pass, and in a forward pass alone.

    Args:
        memory: its training pass is known.
    """
    assert memory.pass_ is not None
    each = memory.pass_.operations / positions_of(memory.rows, memory.tokens)
    if memory.scoring is None:
        return each, each / GROWTH
    at_once = positions_of(memory.scoring_rows, memory.scoring_tokens)
    return each, memory.scoring.operations / at_once


def positions_of(rows: int, tokens: int | None) -> int:
    """Return the positions of a batch: tokens with padding, or its examples."""
    return rows * (tokens or 1)


def products_per_second(
    rows: int,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Return the operations per second of a matrix product [rows, I] x [I, O]."""
    O, I = shape
    like: Any = {"device": device, "dtype": dtype}
    x, W = torch.ones(min(rows, 4096), I, **like), torch.ones(I, O, **like)
    torch.mm(x, W)  # the first call prepares the library
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < MEASURED:
        # the value is read, so that a device has finished
        float(torch.mm(x, W)[0, 0])
        count += 1
    return 2 * len(x) * I * O * count / (time.perf_counter() - start)
