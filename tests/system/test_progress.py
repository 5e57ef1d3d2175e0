"""Passes say what they do, how far they are and how long they still take."""

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from petl.system import progress
from petl.system.progress import Pass, ProgressItems

pytest_plugins = ["training_fixtures"]


class Clock:
    """The time, in place of the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch, petl_log):
    """The text on a terminal."""
    screen = io.StringIO()

    def console(width=140, **_):
        return Console(file=screen, force_terminal=True, width=width, legacy_windows=False)

    monkeypatch.setattr(progress, "Console", console)
    return screen


def plain(screen):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())


def test_without_a_terminal_a_pass_says_its_length_and_then_how_far_it_is(clock, petl_log):
    with Pass("scoring", 10) as shown:
        for _ in range(10):
            clock.now += 4
            shown.advance()
    assert petl_log.messages == [
        "scoring: 10 batches",
        "scoring: 3 of 10 batches, 0:00:28 left",
        "scoring: 6 of 10 batches, 0:00:16 left",
        "scoring: 9 of 10 batches, 0:00:04 left",
    ]


def test_the_time_left_counts_only_what_this_process_did(clock, petl_log):
    with Pass("training", 100, done=50) as shown:
        clock.now += 10
        shown.advance(10)
    assert petl_log.messages[-1] == "training: 60 of 100 batches, 0:00:40 left"


def test_a_quiet_pass_speaks_after_two_seconds(clock, petl_log):
    with Pass("validating", 9, quiet=True) as shown:
        for _ in range(3):
            clock.now += 0.9
            shown.advance()
    assert petl_log.messages == ["validating: 3 of 9 batches, 0:00:05 left"]


def test_of_an_unknown_length_the_units_are_counted(clock, petl_log):
    with Pass("reading", None, unit="rows") as shown:
        clock.now += 11
        shown.advance(7)
    assert petl_log.messages == ["reading", "reading: 7 rows"]


def test_shown_items_are_the_items_each_time(petl_log):
    shown = ProgressItems([1, 2], "calibrating")
    assert (list(shown), list(shown), len(shown)) == ([1, 2], [1, 2], 2)
    assert petl_log.messages == ["calibrating: 2 batches"] * 2
    with pytest.raises(TypeError, match="length"):
        len(ProgressItems(iter([1]), "calibrating"))


def test_on_a_terminal_a_pass_is_a_bar(terminal, petl_log):
    with Pass("scoring", 4) as shown:
        shown.note = "loss 0.5"
        shown.advance(4)
    text = plain(terminal)
    assert re.search(r"scoring .*4/4 0:00:00 left 0:00:00 loss 0\.5", text)
    assert petl_log.messages == []
    assert progress.SCREEN.display is None


def test_an_inner_pass_is_a_second_bar_that_vanishes(terminal):
    with Pass("training", 3) as outer:
        outer.advance()
        with Pass("scoring the validation examples", 2, quiet=True) as inner:
            inner.advance()
            assert len(progress.SCREEN.display.tasks) == 2
        assert [task.description for task in progress.SCREEN.display.tasks] == ["training"]
    assert progress.SCREEN.display is None


def test_results_on_standard_output_are_not_mixed_with_a_bar(
    terminal, petl_log, monkeypatch, capsys
):
    with Pass("answering", None, unit="answers", prints=True) as shown:
        sys.stdout.write("to a file\n")
        shown.advance()
    assert "1/? 0:00:00" in plain(terminal)
    assert (capsys.readouterr().out, "to a file" in terminal.getvalue()) == ("to a file\n", False)
    printed = terminal.getvalue()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Pass("answering", None, unit="answers", prints=True):
        sys.stdout.write("to the terminal\n")
    assert (terminal.getvalue(), petl_log.messages) == (printed, ["answering"])
    assert capsys.readouterr().out == "to the terminal\n"


def test_an_error_in_a_pass_ends_its_bar(terminal):
    with pytest.raises(ZeroDivisionError), Pass("scoring", 2):
        _ = 1 / 0
    assert progress.SCREEN.display is None


def test_other_processes_and_programs_see_nothing(terminal, petl_log, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Pass("scoring", 1) as shown:
        shown.advance()
    monkeypatch.undo()
    petl_log.set_level(logging.WARNING, logger="petl")
    with Pass("scoring", 1) as shown:
        shown.advance()
    assert (petl_log.messages, terminal.getvalue()) == ([], "")
