"""The state of a training run, and its best evaluation."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from petl.errors import InputError
from petl.runs.checkpoint import step_folder, verify
from petl.tasks.base import Task


@dataclass
class TrainState:
    """What a checkpoint keeps besides tensors.

    Attributes:
        step: optimizer steps done.
        tokens: tokens seen, padding left out.
        positions: the same with padding, and with what processes without a row compute for show.
        seconds: spent in the loop.
        cpu_seconds: of processor time that this process spent there, over all its threads.
        spent: seconds by what they were spent on, in the main process.
        window: loss, auxiliary loss and gradient norm of each step since the last log line.
        best: the best validation score, `best_step` when it was reached.
        stale: evaluations since then.
    """

    step: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    window: list[list[float]] = field(default_factory=list)
    best: float | None = None
    best_step: int | None = None
    stale: int = 0

    @property
    def padding(self) -> float:
        """The share of computed positions that held no token."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


logger = logging.getLogger(__name__)


def settle_best(progress: TrainState, checkpoints: Path, log: Path, task: Task) -> TrainState:
    """`progress` with a best step whose checkpoint is whole, or that is the present step.

    A best one that was damaged is forgotten with a warning. The best of those that are left takes
    its place, by the scores in metrics.jsonl (`log`); if none is, the next evaluation is the best.
    """
    step = progress.best_step
    if step is None or step == progress.step:
        return progress
    try:
        verify(step_folder(checkpoints, step))
    except InputError as error:
        logger.warning("forgetting the best checkpoint: %s", error)
    else:
        return progress
    scores = {s: v for s, v in validations(log, task.metric).items() if s <= progress.step}
    left = {s: v for s, v in scores.items() if s == progress.step or is_complete(checkpoints, s)}
    progress.best_step = best_of(left, task.higher_is_better)
    progress.best = None if progress.best_step is None else left[progress.best_step]
    progress.stale = sum(s > (progress.best_step or 0) for s in scores) if left else 0
    if progress.best is None:
        logger.warning("no evaluation before it has a whole checkpoint: the next one is the best")
    else:
        where = "the last one" if progress.best_step == progress.step else "a whole checkpoint"
        logger.warning(
            "the best evaluation is now that of step %d, %s: %s %.4f",
            progress.best_step,
            where,
            task.metric,
            progress.best,
        )
    return progress


def best_of(scores: Mapping[int, float], higher_is_better: bool) -> int | None:
    """The first step with the best score, or None if there are no scores."""
    sign = 1 if higher_is_better else -1
    return max(scores, key=lambda step: (sign * scores[step], -step), default=None)


def is_complete(checkpoints: Path, step: int) -> bool:
    try:
        verify(step_folder(checkpoints, step))
    except InputError:
        return False
    return True


def validations(log: Path, metric: str) -> dict[int, float]:
    """The score of each evaluation in metrics.jsonl, by step."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line["step"]: line["validation"][metric] for line in lines if "validation" in line}
