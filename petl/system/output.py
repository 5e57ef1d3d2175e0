"""Where a run writes its lines: the terminal, or the file of one of several runs of a process."""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

PIPE_CLOSED = 141  # exit status: 128 + SIGPIPE, as of a shell
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


def until_closed(write: Callable[[], int]) -> int:
    """Return the exit status of `write`, or that of a command whose output nobody reads any more.

    Such as with `petl methods | head`, which ends before the command does.
    """
    try:
        status = write()
        sys.stdout.flush()  # here, so that a closed pipe is noticed
    except (BrokenPipeError, SystemExit) as error:
        # rich makes a SystemExit(1) of it
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # or the interpreter would report the error again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return status
