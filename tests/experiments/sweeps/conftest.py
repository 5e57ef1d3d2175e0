"""What the tests of sweeps share."""

import runpy
import signal
import sys

import pytest
from training_fixtures import ROOT, drawing_once

from petl.training import program as app


@pytest.fixture
def program(tmp_path, monkeypatch, capfd):
    """Runs train.py in this process, in an empty folder; returns what it says."""
    monkeypatch.chdir(tmp_path)

    def run(*words, status=0):
        app.closing.clear()
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *words])
        with drawing_once(), pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        err = capfd.readouterr().err
        assert left.value.code == status, err
        return err

    yield run
    app.closing.clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
