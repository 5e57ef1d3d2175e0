"""Where a run writes its lines: the terminal, or the file of one of several runs of a process."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

_file: ContextVar[TextIO | None] = ContextVar("_file", default=None)


@contextmanager
def written_to(file: TextIO) -> Generator[None]:
    """Inside the block, results and messages go to a file."""
    before = _file.set(file)
    try:
        yield
    finally:
        _file.reset(before)


def has_file() -> bool:
    """Return True inside `written_to`."""
    return _file.get() is not None


def results() -> TextIO:
    """Return where results go: standard output as it is now, unless `written_to` names a file."""
    return _file.get() or sys.stdout


def messages() -> TextIO:
    """Return where messages go: standard error as it is now, unless `written_to` names a file."""
    return _file.get() or sys.stderr
