"""Time by phase."""

from itertools import accumulate

import pytest
import torch

from petl.runs.environment import PhaseTimer


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
