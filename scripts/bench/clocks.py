"""Times that are robust on a busy machine: measured alternately, as ratios, with quartiles."""

import gc
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]
STEADY = (0.97, 1.03)  # range of the lower bound's ratio to itself on a quiet machine (assumption)
SPREAD = 0.05  # largest distance of its quartiles on a quiet machine (assumption)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return median and quartiles of these values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def is_noisy(self) -> bool:
        """True if this is too far from 1, or too wide, for the ratio of a time to itself."""
        return not STEADY[0] <= self.median <= STEADY[1] or self.high - self.low > SPREAD


def seconds(step: Step, device: str) -> float:
    """Return the seconds of `step`: processor time on a CPU, else the time of the device."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)  # or earlier kernels in the queue would count
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@dataclass(frozen=True)
class Times:
    """Seconds of candidates and of the lower bound, one value per round.

    Attributes:
        floor: by candidate, the seconds of the lower bound just before the candidate.
        candidate: by candidate, its own seconds.
    """

    floor: Mapping[str, Sequence[float]]
    candidate: Mapping[str, Sequence[float]]

    def over_floor(self, name: str) -> Spread:
        """Ratio of a candidate to the lower bound."""
        return Spread.of(self._ratios(name))

    def median(self, name: str) -> float:
        """Median seconds of a candidate."""
        return statistics.median(self.candidate[name])

    def over(self, name: str, other: str) -> Spread:
        """Ratio of two candidates, each relative to the lower bound of its round."""
        pairs = zip(self._ratios(name), self._ratios(other), strict=True)
        return Spread.of([a / b for a, b in pairs])

    def _ratios(self, name: str) -> list[float]:
        pairs = zip(self.candidate[name], self.floor[name], strict=True)
        return [time / floor for time, floor in pairs]


def in_turn(
    floor: Step, candidates: Mapping[str, Step], *, rounds: int, warm_up: int, device: str
) -> Times:
    """Time steps alternately: the lower bound, two candidates, the lower bound, the next two, ...

    The load of the machine changes slowly, so it affects both parts of a ratio alike.

    Args:
        rounds: timed rounds over all candidates.
        warm_up: untimed rounds before them.
    """
    floors: dict[str, list[float]] = {name: [] for name in candidates}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with uncollected():  # garbage is collected between rounds, not in some steps
        for number in range(warm_up + rounds):
            for index, (name, step) in enumerate(candidates.items()):
                if index % 2 == 0:
                    before = seconds(floor, device)
                time = seconds(step, device)
                if number >= warm_up:
                    floors[name].append(before)
                    times[name].append(time)
            gc.collect()
    return Times(floors, times)


@contextmanager
def uncollected() -> Generator[None]:
    """Disable garbage collection in the block; objects from before are excluded from it.

    What the caller has frozen stays so: Python can only unfreeze all objects.
    """
    collects = gc.isenabled()
    freezes = gc.get_freeze_count() == 0
    gc.collect()
    if freezes:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        if collects:
            gc.enable()


def milliseconds(action: Step, device: str, *, repeats: int = 3) -> float:
    """Return the median time of `repeats` calls of `action` in ms."""
    return 1000 * statistics.median(seconds(action, device) for _ in range(repeats))
