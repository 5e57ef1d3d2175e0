"""What the processes of runs write: processor seconds of their parts, scores, peak memory.

Imports the standard library alone, so that it costs no variant anything.
"""

import json
import time
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


class Clock:
    """Processor seconds of a process, from its start.

    Attributes:
        marks: seconds at named moments.
        points: seconds without evaluations, step and scores, of each evaluation in training.
    """

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self.points: list[dict[str, Any]] = []
        self.evaluating = 0.0

    def mark(self, name: str) -> None:
        """Keep the seconds of now."""
        self.marks[name] = time.process_time()

    def note(self, began: float, step: int, scores: dict[str, Any]) -> None:
        """Keep an evaluation that began at `began` and has ended now."""
        seconds = began - self.evaluating
        self.points.append({"seconds": seconds, "step": step, "scores": scores})
        self.evaluating += time.process_time() - began

    def write(self, file: Path, **more: Any) -> None:
        """Write everything as JSON, with further entries."""
        content = {"marks": self.marks, "points": self.points, "peak": peak(), **more}
        file.write_text(json.dumps(content))


def peak() -> int:
    """Return the peak resident memory of this process in bytes.

    `getrusage` would count that of the process which started it.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
