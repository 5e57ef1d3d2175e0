"""Scripts refuse wrong arguments before any work, with exit status 2 and without a traceback."""

import runpy
import sys

import pytest
from training_fixtures import ROOT

CASES = [
    ("chaos.py", ["--kinds", "nope"], "no 'nope'"),
    ("chaos.py", ["--kinds", "kill -9 of torchrun"], "needs --processes of 2 or more"),
    ("chaos.py", ["--faults", "x"], "'x' is not an integer from 1"),
    ("chaos.py", ["--method", "lroa"], "no method 'lroa'; did you mean 'lora'"),
    ("bench.py", ["--rounds", "a"], "'a' is not an integer"),
    ("bench.py", ["--out", "FOLDER"], "is no file that can be written"),
    ("bench.py", ["--check", "MISSING"], "does not exist"),
    ("make_compatibility_fixtures.py", ["--check", "MISSING"], "does not exist"),
    ("make_wordnet.py", ["MISSING"], "does not exist"),
]


@pytest.mark.parametrize(("script", "words", "message"), CASES, ids=lambda value: str(value)[:30])
def test_wrong_arguments_are_refused_before_any_work(
    tmp_path, monkeypatch, capsys, script, words, message
):
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["FILE", "FOLDER"]
