"""Ctrl-C while a program imports torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# runs a program whose import of torch takes long enough for Ctrl-C
INTERRUPTED = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
        return None

signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background ignores it
sys.meta_path.insert(0, Interrupting())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["train.py", "petl/__main__.py"])
def test_it_ends_with_one_line_and_the_status_of_a_shell(program, tmp_path):
    train = ["train"] if program != "train.py" else []
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, ROOT / program, *train, "+method=lora"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []
