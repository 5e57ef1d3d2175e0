"""What a run will cost: time from counted operations, and settings that would make it cheaper."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from petl.core.dry_run import PassMemory
from petl.data.batch_sampler import Ints, padding_fraction
from petl.planning.memory import Memory
from petl.runs.settings import TrainConfig
from petl.training.dataloader import Splits, buckets_of

# assumptions: what makes a setting worth a line
MUCH_PADDING = 0.2  # of the positions
MUCH_FASTER = 0.8  # of the time of matrix products
MUCH_SCORING = 0.25  # of the time of the steps
MUCH_OF_A_PASS = 0.5  # of the memory of a step
MEASURED = 0.1  # seconds that the matrix products are measured for
GROWTH = 3  # a training pass computes some three times as much as a forward pass


@dataclass(frozen=True)
class Time:
    """Estimated seconds on this machine.

    Attributes:
        steps: of all optimizer steps.
        scoring: of one evaluation of the test examples.
        speed: measured operations per second.
        speed_bf16: the same in bfloat16.
    """

    steps: float
    scoring: float
    speed: float
    speed_bf16: float


def time_of(
    memory: Memory, positions: float, scored: float, shape: tuple[int, int], device: torch.device
) -> Time | None:
    """Return the estimated time of a run; None if no pass could be planned.

    Args:
        memory: its passes have the number of operations.
        positions: computed in all steps: tokens with padding, images or clips.
        scored: the same, of the test examples.
        shape: [O, I] of the weight whose products are measured.
        device: that of the run.
    """
    if memory.pass_ is None:
        return None
    rows = positions_of(memory.rows, memory.tokens)
    speed = products_per_second(rows, shape, device)
    speed_bf16 = products_per_second(rows, shape, device, torch.bfloat16)
    each = memory.pass_.operations / positions_of(memory.rows, memory.tokens)
    forward = each / GROWTH
    if memory.scoring is not None:
        at_once = positions_of(memory.scoring_rows, memory.scoring_tokens)
        forward = memory.scoring.operations / at_once
    return Time(positions * each / speed, scored * forward / speed, speed, speed_bf16)


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


def advice(
    memory: Memory, seconds: Time | None, lengths: Ints, splits: Splits, settings: TrainConfig
) -> list[str]:
    """Return settings that would make the run cheaper, each with what it saves."""
    found = []
    order = splits.sampler(settings)
    padding = padding_fraction(lengths, order.global_batches()) if len(lengths) else 0.0
    # a mixture decides which rows a step has, so that they cannot be of similar length
    is_free = settings.buckets is None and settings.batch_sizes is None
    may_bucket = is_free and splits.task.reads_text and splits.mixture is None
    if padding > MUCH_PADDING and may_bucket:
        buckets = buckets_of(lengths, replace(settings, buckets="auto"))
        if buckets is not None:
            after = padding_fraction(lengths, buckets.batches(settings.seed, 0))
            # the same tokens in fewer positions
            less = (1 - padding) / (1 - after)
            found.append(
                f"train.buckets=auto (batches of similar length, {len(buckets.rows)} buckets): "
                f"{100 * after:.1f} % padding instead of {100 * padding:.1f} %, so "
                f"{100 * less:.0f} % of the positions of a step"
            )
    if seconds is not None and settings.precision == "no":
        slower = seconds.speed / max(seconds.speed_bf16, 1e-9)
        if slower < MUCH_FASTER:
            found.append(
                "train.precision=bf16 (products in bfloat16): matrix products of this size take "
                f"{100 * slower:.0f} % of their time in float32 on this machine"
            )
    found += _less_memory(memory, settings)
    if seconds is not None and settings.test and seconds.scoring > MUCH_SCORING * seconds.steps:
        setting = "test_rows:N of sets" if splits.task.scores_by_task else "data.test_rows=N"
        found.append(
            f"{setting} (fewer test examples): each evaluation of the {len(splits.test):,} "
            f"takes {100 * seconds.scoring / max(seconds.steps, 1e-9):.0f} % of the time of all "
            "steps"
        )
    return found


def _less_memory(memory: Memory, settings: TrainConfig) -> list[str]:
    """Settings for a smaller pass, if it is much of the memory of a step."""
    peak: PassMemory | None = memory.pass_
    if peak is None or peak.peak < MUCH_OF_A_PASS * (memory.fixed + peak.peak):
        return []
    found = []
    if memory.rows > 1:
        half = memory.rows // 2
        less = megabytes(peak.peak * half // memory.rows)
        found.append(
            f"train.micro_batch_size={half} (gradient accumulation): about {less} for a pass "
            f"instead of {megabytes(peak.peak)}, with the same examples per step"
        )
    if not settings.gradient_checkpointing:
        found.append(
            f"train.gradient_checkpointing=true: frees most of the {megabytes(peak.kept)} of "
            "activations, for about a third more time"
        )
    return found


def megabytes(count: int) -> str:
    """Format a number of bytes of an estimate."""
    return f"{count / 1e6:,.0f} MB"
