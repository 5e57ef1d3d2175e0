"""Errors that are the reader's to mend, and how they are worded.

Entry points show an `InputError` as one message and exit with status 2; anything else is a bug
of ours and keeps its traceback.
"""

import math
from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A value that was given cannot be used; the message says what is allowed instead."""


class UnknownNameError(InputError, KeyError):
    """A name that is not in a table."""

    __str__ = ValueError.__str__  # KeyError would show the message in quotes


class ModuleKindError(InputError, TypeError):
    """A module of a kind that the method cannot adapt."""


class UnsupportedError(InputError, NotImplementedError):
    """Something that a method cannot do by its nature."""


def did_you_mean(name: str, options: Iterable[str], *, limit: int = 40) -> str:
    """The end of a message about an unknown `name`: the nearest options, or all of them.

    >>> near("mloa", ["lora", "mola", "mos"])
    "; did you mean 'mola' or 'lora'?"
    >>> near("x", ["lora", "mola"])
    '; there are lora, mola'
    """
    names = sorted(set(options))
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    if not names:
        return "; there are none"
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return f"; there are {', '.join(names[:limit])}{more}"


class RunStopped(RuntimeError):
    """A run that ends early for a reason outside the code; entry points exit with `status`."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message, status)  # both: it travels between processes as a pickle
        self.status = status

    def __str__(self) -> str:
        return self.args[0]


class JobSkipped(Exception):
    """A job of a sweep that need not be done: its run is finished, or another worker is at it.

    Attributes:
        objective: what the run has reached, NaN if that is still open.
    """

    def __init__(self, message: str, objective: float = math.nan) -> None:
        super().__init__(message, objective)  # both: it travels between processes as a pickle
        self.objective = objective

    def __str__(self) -> str:
        return self.args[0]


def first_line(error: Exception) -> str:
    """The first line of an error's message: what happened, without the context that follows."""
    return str(error).strip().split("\n", 1)[0]
