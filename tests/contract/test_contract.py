"""Every registered method keeps the promises of a PEFT tuner; see `petl.testing`."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import standin
from contract_cases import ADOPTED_CASES, OWN_CASES

from petl import testing
from petl.testing import Case


def params(cases: list[Case]) -> list:
    """One test for each case and each check that applies to it."""
    return [
        pytest.param(case, check, id=f"{case}-{check}", marks=marks(case, check))
        for case in cases
        for check in testing.checks(case)
    ]


def marks(case: Case, check: str) -> list[pytest.MarkDecorator]:
    entry = testing.CHECKS[check]
    slow = entry.slow or (check == "two_processes_equal_one" and not case.promises.own)
    lacking = bool(entry.package) and find_spec(entry.package) is None
    extra = "deepspeed" if entry.package == "deepspeed" else "quantized"
    skip = pytest.mark.skipif(lacking, reason=f"pip install -e '.[{extra}]'")
    return [*([pytest.mark.slow] if slow else []), *([skip] if entry.package else [])]


@pytest.mark.parametrize(("case", "check"), params(OWN_CASES))
def test_own_method_keeps_its_promise(case, check, device):
    hold(case, check, device)


@pytest.mark.parametrize(("case", "check"), params(ADOPTED_CASES))
def test_adopted_method_keeps_its_promise(case, check, device):
    hold(case, check, device)


def hold(case: Case, check: str, device: str) -> None:
    """Run a check on a device; what has processes of its own is of the CPU."""
    if device != "cpu" and "process" in check:
        pytest.skip("its processes know no other device than the CPU")
    lacks = [standin.LACKING[name] for name in (case.method, check) if name in standin.LACKING]
    if device == standin.NAME and lacks:
        pytest.skip(f"the device has no {lacks[0]}")
    testing.run(check, replace(case, device=device))
