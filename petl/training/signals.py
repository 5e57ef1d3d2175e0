"""Signals that ask a run to stop: it finishes its step, saves, and says how to go on."""

import os
import signal
import threading
from types import FrameType
from typing import Any

ASKS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Catches SIGINT and SIGTERM inside its block; a second SIGINT stops at once.

    Attributes:
        signal: the first that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._note) for number in ASKS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal and os.environ.get("RANK", "0") == "0":
            # straight to the file: a log call may be what the signal interrupted
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops at once\n")
        self.signal = self.signal or number
