"""What a process has once, and each of the runs in its threads sets."""

import sys

from petl.training.distributed.launch import start
from petl.training.together.lanes import process_state, set_process_state


def test_a_run_gets_its_precision_and_command_line_back(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["first"])
    first = start(0, "bf16")
    kept = process_state()
    second = start(0, "no")
    sys.argv[:] = ["second"]
    assert first.mixed_precision == second.mixed_precision == "no"  # accelerate has one state
    set_process_state(kept)
    assert first.mixed_precision == "bf16"
    assert sys.argv == ["first"]
