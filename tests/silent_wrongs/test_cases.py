"""Public cases of wrong results without an error: petl is right, refuses, or warns."""

import pytest
from silent_cases.petl_side import CASES
from silent_cases.verdicts import SILENT

# what other tests have as well: micro-batches, two processes, resuming, the best checkpoint
SLOW = ("T1", "T2", "T3", "T6", "T8")


@pytest.mark.cells(25)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            id=f"{case.id} {case.threads}",
            marks=[pytest.mark.thorough] if case.id in SLOW else [],
        )
        for name, case in CASES.items()
    ],
)
def test_petl_is_right_or_says_so(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    verdict = CASES[name].run(tmp_path)
    assert verdict.kind != SILENT, f"{CASES[name].symptom}: {verdict.detail}"
