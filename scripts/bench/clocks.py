"""Times that mean something on a busy machine: taken in turn, as ratios, with their spread."""

import gc
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]
STEADY = (0.97, 1.03)  # where the floor's ratio to itself must lie
SPREAD = 0.05  # the most that its quartiles may be apart


@dataclass(frozen=True)
class Spread:
    """The median of figures, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        if len(figures) == 1:
            return cls(figures[0], figures[0], figures[0])
        low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def is_noisy(self) -> bool:
        """Whether this is too far from 1, or too wide, for a ratio of something to itself."""
        return not STEADY[0] <= self.median <= STEADY[1] or self.high - self.low > SPREAD


def seconds(step: Step, device: str) -> float:
    """Seconds of `step`: processor time of this process, or the device's own time."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)  # nothing earlier is left in the queue
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@dataclass(frozen=True)
class Times:
    """Seconds of candidates and of the floor, round by round.

    Attributes:
        floor: by candidate, of the floor's steps just before the candidate's.
        candidate: by candidate.
    """

    floor: Mapping[str, Sequence[float]]
    candidate: Mapping[str, Sequence[float]]

    def over_floor(self, name: str) -> Spread:
        return Spread.of(self._ratios(name))

    def median(self, name: str) -> float:
        """Seconds of the candidate."""
        return statistics.median(self.candidate[name])

    def over(self, name: str, other: str) -> Spread:
        """`name` over `other`, each over the floor beside it."""
        pairs = zip(self._ratios(name), self._ratios(other), strict=True)
        return Spread.of([a / b for a, b in pairs])

    def _ratios(self, name: str) -> list[float]:
        pairs = zip(self.candidate[name], self.floor[name], strict=True)
        return [time / floor for time, floor in pairs]


def in_turn(
    floor: Step, candidates: Mapping[str, Step], *, rounds: int, warm_up: int, device: str
) -> Times:
    """Time by turns: the floor, two candidates, the floor, the next two, and so on.

    Args:
        rounds: timed rounds over all candidates.
        warm_up: rounds before them.
    """
    beside: dict[str, list[float]] = {name: [] for name in candidates}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with uncollected():  # each round collects its own, not one step that of many
        for number in range(warm_up + rounds):
            for index, (name, step) in enumerate(candidates.items()):
                if index % 2 == 0:
                    before = seconds(floor, device)
                time = seconds(step, device)
                if number >= warm_up:
                    beside[name].append(before)
                    times[name].append(time)
            gc.collect()
    return Times(beside, times)


@contextmanager
def uncollected() -> Generator[None]:
    """Within it Python collects no garbage by itself, and never looks at what was there before."""
    collects = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()


def milliseconds(action: Step, device: str, *, repeats: int = 3) -> float:
    """The median time of `action`, which is called `repeats` times, in ms."""
    return 1000 * statistics.median(seconds(action, device) for _ in range(repeats))
