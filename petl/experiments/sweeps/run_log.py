"""Why a run failed, by the end of its log."""

import re
from pathlib import Path

from petl.errors import shortened
from petl.system.files.disk import open_inside

TAIL = 2**16  # bytes from the end of a log in which the error is looked for
LONGEST = 400  # characters of the reason
# of petl, and the last line of a traceback, below which a long message goes on
ERROR = re.compile(r"error: |[\w.]+(Error|Exception|Interrupt|Exit)\b(: |$)")


def reason_in(log: Path, written: int = 0) -> str:
    """Return the last error in the log of a run that failed; without one, its last line.

    Args:
        written: bytes at the beginning that are of earlier attempts.
    """
    lines = [line.strip() for line in _end_of(log, written).splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    if not lines:
        return "it ended without a message"
    reason = errors[-1].removeprefix("error: ") if errors else f"its log ends with: {lines[-1]}"
    return shortened(reason)[:LONGEST]


def _end_of(log: Path, written: int) -> str:
    if not log.exists():
        return ""
    with open_inside(log) as opened:
        size = opened.seek(0, 2)
        opened.seek(max(written, size - TAIL))
        return opened.read().decode(errors="replace")
