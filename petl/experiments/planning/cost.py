"""The time of a run, from counted operations and the speed of this machine."""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from petl.experiments.planning.memory import Memory

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
        filling: of the pass of the frozen blocks over the examples whose output is kept.
    """

    steps: float
    scoring: float
    speed: float
    speed_bf16: float
    filling: float = 0.0


class CachedStates(NamedTuple):
    """The output of frozen blocks that a run reads from a store.

    Attributes:
        saved: fraction of the operations of a training pass that these blocks take.
        filled: positions for which it is computed before training.
    """

    saved: float
    filled: float


NOTHING = CachedStates(0.0, 0.0)


def time_of(
    memory: Memory,
    positions: float,
    scored: float,
    shape: tuple[int, int],
    device: torch.device,
    *,
    bf16: bool = False,
    stored: CachedStates = NOTHING,
) -> Time | None:
    """Return the estimated time of a run; None if no pass could be planned.

    Args:
        memory: its passes have the number of operations.
        positions: computed in all steps: tokens with padding, images or clips.
        scored: the same, of the test examples.
        shape: [O, I] of the weight whose products are measured.
        device: that of the run.
        bf16: its products are in bfloat16.
        stored: what the run reads from a store.
    """
    if memory.pass_ is None:
        return None
    rows = positions_of(memory.rows, memory.tokens)
    speed = products_per_second(rows, shape, device)
    speed_bf16 = products_per_second(rows, shape, device, torch.bfloat16)
    each, forward = operations_of(memory, stored.saved)
    own = speed_bf16 if bf16 else speed
    frozen = operations_of(memory)[0] * stored.saved
    return Time(
        steps=positions * each / own,
        scoring=scored * forward / own,
        speed=speed,
        speed_bf16=speed_bf16,
        filling=stored.filled * frozen / own,
    )


def operations_of(memory: Memory, saved: float = 0.0) -> tuple[float, float]:
    """Return the operations of a position in a training pass, and in a forward pass alone.

    Args:
        memory: its training pass is known.
        saved: as in `CachedStates`. Evaluations read the store too.
    """
    assert memory.pass_ is not None
    each = memory.pass_.operations / positions_of(memory.rows, memory.tokens)
    forward = each / GROWTH
    if memory.scoring is not None:
        at_once = positions_of(memory.scoring_rows, memory.scoring_tokens)
        forward = memory.scoring.operations / at_once
    # frozen blocks have no backward pass: the same operations in both
    # not below 0, as a batch of shorter rows may be of fewer operations a position (assumption)
    return each * (1 - saved), max(0.0, forward - each * saved)


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
