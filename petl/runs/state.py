"""How far a run has come."""

from dataclasses import dataclass, field


@dataclass
class Progress:
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
