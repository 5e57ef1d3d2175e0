"""Public cases of wrong results without an error: petl is right, refuses, or warns."""

import pytest
from silent_cases.petl_side import CASES
from silent_cases.verdicts import SILENT


@pytest.mark.parametrize("name", CASES, ids=[f"{c.id} {c.threads}" for c in CASES.values()])
def test_petl_is_right_or_says_so(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    verdict = CASES[name].run(tmp_path)
    assert verdict.kind != SILENT, f"{CASES[name].symptom}: {verdict.detail}"
