"""The registry of checks: list them, parametrize a test with them, run one."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from unittest import SkipTest

from transformers import PreTrainedModel

from petl.core.registry import refusal
from petl.core.support import Capability
from petl.errors import InputError, choose
from petl.testing.case import Case

Rule = Callable[[Case], bool]


@dataclass(frozen=True)
class Check:
    """A check: a promise, and a function of a case that raises AssertionError if it is broken.

    Attributes:
        name: of the function.
        promise: the first line of its docstring.
        holds: the function.
        applies: function of a case: True if the check is meant for its method and model.
        slow: True if it takes more than a few seconds.
        package: the optional package that it needs, by the name that installs and imports it.
        of: the capability whose column of docs/support.md it proves; None: it is no column's.
        refuses: True if it proves itself that a method without the capability refuses.
    """

    name: str
    promise: str
    holds: Callable[[Case], None]
    applies: Rule
    slow: bool
    package: str = ""
    of: Capability | None = None
    refuses: bool = False

    def is_slow_for(self, case: Case) -> bool:
        """Return True if the check is slow, or slow for this case: PEFT's methods in processes."""
        return self.slow or (self.name == "two_processes_equal_one" and not case.promises.own)

    @property
    def missing(self) -> str:
        """Why the check cannot run here: a package that is not installed; "" if it can."""
        if not self.package:
            return ""
        spec = find_spec(self.package)
        # no origin: a folder of that name in the working directory
        if spec is not None and spec.origin is not None:
            return ""
        return f"{self.package} is not installed; run: pip install {self.package}"


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


def of_transformers(case: Case) -> bool:
    """Checks of what transformers' models have: checkpointing, `from_pretrained`."""
    return isinstance(case.tiny.original(), PreTrainedModel)


def on_llama(case: Case) -> bool:
    """Checks for which one architecture is enough: the others differ in names only."""
    return case.tiny.name == "llama" if case.stands_for_all is None else case.stands_for_all


def own_on_llama(case: Case) -> bool:
    """Checks for methods registered with `petl.register`, on one architecture."""
    return own(case) and on_llama(case)


def check(
    applies: Rule = every,
    *,
    slow: bool = False,
    package: str = "",
    of: Capability | None = None,
    refuses: bool = False,
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function as a check, under its own name; its docstring is the promise.

    Args:
        applies: function of a case: True if the check is meant for its method and model.
        slow: it takes more than a few seconds.
        package: the optional package that it needs; without it the check is skipped.
        of: the capability that it proves: a method that lacks it must raise with its reason.
        refuses: it proves itself that a method without the capability refuses.
    """

    def add(function: Callable[[Case], None]) -> Callable[[Case], None]:
        name, promise = str(getattr(function, "__name__", "")), inspect.getdoc(function) or ""
        summary = promise.partition("\n")[0]
        CHECKS[name] = Check(name, summary, function, applies, slow, package, of, refuses)
        return function

    return add


def checks(case: Case | None = None, *, slow: bool | None = None) -> list[str]:
    """Return the names of the checks, of those that apply to `case` if one is given.

    Args:
        case: the method, its fields and a model; None: all checks.
        slow: only the slow ones (True), or only the others (False).

    Raises:
        UnknownNameError: the case excuses or refuses a check that does not exist.
    """
    # a misspelled name would silently excuse nothing
    for name in (*case.excused, *case.refuses) if case else ():
        known(name)
    return [
        name
        for name, entry in CHECKS.items()
        if (slow is None or entry.slow == slow)
        and (case is None or (entry.applies(case) and name not in case.excused))
    ]


def params(cases: Iterable[Case], *, slow: bool | None = None) -> Iterator[object]:
    """Yield a `pytest.param(case, check)` for each case and each check that applies to it.

    They have readable ids, the mark `slow` where it applies (register it in your pytest settings:
    `markers = ["slow: takes more than a few seconds"]`), and are skipped, with the line that
    installs it, where a package is missing.

        @pytest.mark.parametrize(("case", "check"), testing.params(CASES))
        def test_contract(case, check):
            testing.run(check, case)

    Args:
        cases: methods, their fields and models.
        slow: only the slow checks (True), or only the others (False).
    """
    import pytest  # here, since checks run without it

    for case in cases:
        for name in checks(case):
            entry = CHECKS[name]
            is_slow = entry.is_slow_for(case)
            if slow is not None and is_slow != slow:
                continue
            marks = [pytest.mark.slow] if is_slow else []
            if entry.missing:
                marks.append(pytest.mark.skip(reason=entry.missing))
            yield pytest.param(case, name, id=f"{case}-{name}", marks=marks)


def run(name: str, case: Case) -> None:
    """Run one check on a case.

    If the check is about a capability that the method lacks (`Method.lacks`), the method must
    raise an InputError with that reason.

    Raises:
        AssertionError: the promise is broken; the message says how.
        UnknownNameError: there is no such check.
        unittest.SkipTest: a package that the check needs is not installed; pytest and unittest
            report the test as skipped, with the line that installs it.
    """
    entry = known(name)
    if entry.missing:
        raise SkipTest(entry.missing)
    is_open = entry.of is None or entry.refuses
    reason = "" if is_open else refusal(case.config(), entry.of)
    try:
        entry.holds(case)
    except AssertionError as error:
        fault = str(error) or f"this does not hold: {entry.promise}"
        raise AssertionError(f"{case}, {name}: {fault}") from error
    except InputError as error:
        # an InputError that is not the announced one
        if (not reason or reason not in str(error)) and name not in case.refuses:
            raise
    else:
        if reason or name in case.refuses:
            raise AssertionError(
                f"{case} should refuse {name!r} with an InputError"
                + (f" that has {reason!r}" if reason else "")
                + ", and did not"
            )


def known(name: str) -> Check:
    """Return the check called `name`.

    Raises:
        UnknownNameError: there is none; the message suggests the closest matches.
    """
    return choose(CHECKS, name, "check")
