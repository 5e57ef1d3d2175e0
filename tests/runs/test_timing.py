"""Where the time goes."""

from itertools import accumulate

import pytest
import torch

from petl.runs.environment import PhaseTimer


def test_a_lap_reaches_from_the_mark_before_it(monkeypatch):
    marks = accumulate([100.0, 1.0, 2.0, 4.0, 8.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(marks))
    laps = PhaseTimer(torch.device("cpu"))
    laps.start()  # at 100
    laps.lap("forward")
    laps.lap("backward")
    laps.lap("forward")
    assert laps.settle() == {"forward": 5.0, "backward": 2.0}
    laps.start()  # what was in between counts for nothing
    laps.lap("backward")
    assert laps.settle() == {"forward": 5.0, "backward": 18.0}


def test_on_cuda_the_device_is_timed_and_waited_for_only_at_the_end(monkeypatch):
    now, waits = iter([0.0, 30.0, 50.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)  # milliseconds on the device

        def elapsed_time(self, end):
            assert waits, "read before the device was there"
            return end.at - self.at

        def synchronize(self):
            waits.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    laps = PhaseTimer(torch.device("cuda"))
    laps.start()
    laps.lap("forward")
    laps.lap("backward")
    assert not waits
    assert laps.settle() == pytest.approx({"forward": 0.03, "backward": 0.02})
    assert len(waits) == 1
