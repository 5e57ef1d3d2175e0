"""Time by phase, and the revision of the code."""

import re
import subprocess
from itertools import accumulate

import pytest
import torch

from petl.training.runs.environment import PhaseTimer, git_revision


def test_a_phase_lasts_from_the_previous_mark_to_its_own(monkeypatch):
    marks = accumulate([100.0, 1.0, 2.0, 4.0, 8.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(marks))
    timer = PhaseTimer(torch.device("cpu"))
    timer.start()  # at 100
    timer.mark("forward")
    timer.mark("backward")
    timer.mark("forward")
    assert timer.totals() == {"forward": 5.0, "backward": 2.0}
    timer.start()  # the time in between is not counted
    timer.mark("backward")
    assert timer.totals() == {"forward": 5.0, "backward": 18.0}


def test_on_cuda_events_are_timed_and_synchronized_only_in_totals(monkeypatch):
    now, waits = iter([0.0, 30.0, 50.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)  # milliseconds on the device

        def elapsed_time(self, end):
            assert waits, "read before a synchronization"
            return end.at - self.at

        def synchronize(self):
            waits.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = PhaseTimer(torch.device("cuda"))
    timer.start()
    timer.mark("forward")
    timer.mark("backward")
    assert not waits
    assert timer.totals() == pytest.approx({"forward": 0.03, "backward": 0.02})
    assert len(waits) == 1


def test_the_revision_is_that_of_a_repository_that_has_the_files(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)

    package = tmp_path / ".venv" / "petl"
    package.mkdir(parents=True)
    (package / "file.py").write_text("")
    git("init")
    assert git_revision(package) is None
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    git(*author, "commit", "--allow-empty", "-m", "of a project around the environment")
    assert git_revision(package) is None
    git("add", ".venv/petl/file.py")
    git(*author, "commit", "-m", "with the package")
    assert re.fullmatch(r"[0-9a-f]{40}", git_revision(package))
    (package / "file.py").write_text("changed")
    assert git_revision(package).endswith("+")
