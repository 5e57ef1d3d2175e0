"""The figures of scripts/structure.py keep their bounds."""

import os
import subprocess
from pathlib import Path

import pytest
import warm_python

SCRIPT = Path(__file__).parents[2] / "scripts" / "structure.py"


@pytest.mark.thorough
def test_every_figure_keeps_its_bound():
    # petl is imported anew, so that the files that run in its imports count
    command = [warm_python.python(), str(SCRIPT), "--run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "quickstart" in found.stdout
    assert "NOT KEPT" not in found.stdout
