"""Every registered method keeps the promises of a PEFT tuner; see `petl.testing`."""

from dataclasses import fields, replace

import pytest
import standin
from contract_cases import ADOPTED_CASES, OWN_CASES, KeptCase, own, promises

import petl
from petl import testing
from petl.testing import Case
from petl.testing.bases import REFUSED


@pytest.mark.cells(4)
@pytest.mark.parametrize(("case", "check"), promises(OWN_CASES))
def test_own_method_keeps_its_promise(case, check, device):
    hold(case, check, device)


@pytest.mark.thorough
@pytest.mark.parametrize(("case", "check"), testing.params(ADOPTED_CASES))
def test_adopted_method_keeps_its_promise(case, check, device):
    hold(case, check, device)


@pytest.mark.parametrize(("name", "base"), [(n, b) for b in REFUSED for n in REFUSED[b]])
def test_a_method_refuses_the_bases_that_it_cannot_adapt(name, base):
    with pytest.raises(petl.InputError):
        own(name, base).wrap()


def hold(case: Case, check: str, device: str) -> None:
    """Run a check on a device; checks with processes of their own run on the CPU only."""
    if device != "cpu" and "process" in check:
        pytest.skip("its processes use the CPU only")
    asked = (case.method, str(case.model), check)
    lacks = [standin.LACKING[name] for name in asked if name in standin.LACKING]
    if device == standin.NAME and lacks:
        pytest.skip(f"the device has no {lacks[0]}")
    case = replace(case, device=device)
    # where copies are known to be equal, and the case goes to no other process
    alone = device == "cpu" and "process" not in check and "field" not in check
    if alone and "copies" not in " ".join(case.excused):
        case = KeptCase(**{each.name: getattr(case, each.name) for each in fields(case)})
    testing.run(check, case)
