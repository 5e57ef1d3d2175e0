"""The table of checks, and the ways to list and run them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from petl.core.registry import refusal
from petl.core.spec.capabilities import capability_of
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.testing.case import Case

Rule = Callable[[Case], bool]


@dataclass(frozen=True)
class Check:
    """A promise, as a function of a case that raises AssertionError when it is broken."""

    name: str
    promise: str
    holds: Callable[[Case], None]
    applies: Rule
    slow: bool
    package: str = ""  # that it needs


CHECKS: dict[str, Check] = {}


def every(case: Case) -> bool:
    """Checks for any PEFT method."""
    return True


def own(case: Case) -> bool:
    """Checks for methods registered with `petl.register`."""
    return case.promises.own


def merging(case: Case) -> bool:
    """Checks for methods that merge."""
    return case.promises.merges


def on_llama(case: Case) -> bool:
    """Checks that one architecture shows; the others differ in names only."""
    return case.tiny.name == "llama"


def check(
    applies: Rule = every, *, slow: bool = False, package: str = ""
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Put a function in the table, under its own name; its docstring is the promise."""

    def add(function: Callable[[Case], None]) -> Callable[[Case], None]:
        name, promise = str(getattr(function, "__name__", "")), inspect.getdoc(function) or ""
        CHECKS[name] = Check(name, promise.partition("\n")[0], function, applies, slow, package)
        return function

    return add


def checks(case: Case | None = None, *, slow: bool | None = None) -> list[str]:
    """Names of the checks, of those that apply to `case` if one is given.

    Args:
        slow: only those that take longer (True), or only the others (False).

    Raises:
        UnknownNameError: the case excuses or refuses a check that there is not.
    """
    for name in (*case.excused, *case.refuses) if case else ():
        known(name)
    return [
        name
        for name, entry in CHECKS.items()
        if (slow is None or entry.slow == slow)
        and (case is None or (entry.applies(case) and name not in case.excused))
    ]


def run(name: str, case: Case) -> None:
    """Run one check on a case.

    Where the check is about a capability that the method lacks (`Method.unsupported`), it must be
    refused for that reason.

    Raises:
        AssertionError: the promise is broken; the message says how.
        UnknownNameError: there is no such check.
    """
    entry = known(name)
    limit = refusal(case.config(), capability_of(name))
    try:
        entry.holds(case)
    except AssertionError as error:
        reason = str(error) or f"it does not hold that: {entry.promise}"
        raise AssertionError(f"{case}, {name}: {reason}") from error
    except InputError as error:
        if (not limit or limit not in str(error)) and name not in case.refuses:
            raise
    else:
        if limit or name in case.refuses:
            raise AssertionError(f"{case} should refuse {name!r} with an InputError, and did not")


def known(name: str) -> Check:
    """The check called `name`."""
    if name not in CHECKS:
        raise UnknownNameError(f"no check {name!r}" + did_you_mean(name, CHECKS))
    return CHECKS[name]
