"""Why a run failed, by the end of its log."""

import pytest

from petl.experiments.sweeps.run_log import reason_in


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("step 1\nerror: no room\nresume with: petl train\n", "no room"),
        ("error: first\nerror: second\n", "second"),
        (
            "Traceback (most recent call last):\n  File 'a.py'\ntorch.OutOfMemoryError: CUDA out\n"
            "For debugging consider a setting\n",
            "torch.OutOfMemoryError: CUDA out",
        ),
        ("Traceback (most recent call last):\nAssertionError\n", "AssertionError"),
        ("the loss is nan at step 3\n\n", "its log ends with: the loss is nan at step 3"),
        ("", "it ended without a message"),
        (f"error: {'a word ' * 1000}", f"{'a word ' * 57}a"),
    ],
)
def test_the_reason_is_the_last_error_of_a_log(tmp_path, text, reason):
    log = tmp_path / "run.log"
    log.write_text(text)
    assert reason_in(log) == reason


def test_errors_of_earlier_attempts_are_not_the_reason(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("error: before\n")
    written = log.stat().st_size
    with log.open("a") as more:
        more.write("the loss is nan\n")
    assert reason_in(log, written) == "its log ends with: the loss is nan"


def test_a_log_of_any_bytes_and_none_have_a_reason(tmp_path):
    log = tmp_path / "run.log"
    assert reason_in(log) == "it ended without a message"
    log.write_bytes(b"\xff" * 100_000 + b"\nerror: late\n")
    assert reason_in(log) == "late"
