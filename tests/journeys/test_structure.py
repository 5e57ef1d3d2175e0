"""The figures of scripts/structure.py keep their bounds."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "structure.py"


def test_every_figure_keeps_its_bound():
    command = [sys.executable, SCRIPT, "--run"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "quickstart" in found.stdout
    assert "NOT KEPT" not in found.stdout
