"""Checks of a drafter's fields, which may be those of a file that somebody else has written."""

from typing import Any

from petl.errors import InputError


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise InputError unless a field is an integer from `low` to `high`; None: no upper bound."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"from {low} to {high}"
        raise InputError(f"{name}={value!r} is no integer {allowed}")


def check_count(name: str, value: Any, high: int) -> None:
    """Raise InputError unless a field is "auto" or an integer from 1 to `high`."""
    if value != "auto":
        try:
            check_integer(name, value, 1, high)
        except InputError as error:
            raise InputError(f"{error}, and not 'auto'") from error


def check_bool(name: str, value: Any) -> None:
    """Raise InputError unless a field is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r} is neither True nor False")
