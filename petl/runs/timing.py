"""Where the time of a run goes, measured without waiting for the device."""

import time
from typing import Any

import torch


class Laps:
    """Seconds by what they were spent on; each lap reaches from the mark before it to its own.

    On a CUDA device the marks are events in its stream, so that a lap says how long the device was
    at it, or stood idle because of it: the host only queues work there, and its own clock would
    tell how long the queueing took. The marks are read at `settle`.

    Attributes:
        spent: seconds by name, as of the last `settle`.
        on_device: whether they are on the device's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.spent: dict[str, float] = {}
        self.last: Any = None
        self.open: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        """Set a mark without a lap: what came before it counts for nothing."""
        self.last = self._mark()

    def lap(self, name: str) -> None:
        """The time since the last mark was spent on `name`."""
        mark = self._mark()
        self.open.append((name, self.last, mark))
        self.last = mark

    def settle(self) -> dict[str, float]:
        """Seconds by name so far; waits for the device, so call it where that is done anyway."""
        if self.on_device and self.open:
            self.open[-1][2].synchronize()
        for name, start, end in self.open:
            seconds = start.elapsed_time(end) / 1e3 if self.on_device else end - start
            self.spent[name] = self.spent.get(name, 0.0) + seconds
        self.open.clear()
        return dict(self.spent)

    def _mark(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
