"""Runs that are forked from a process with the libraries: as those that are started alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import warm_python
from training_fixtures import Finished, command_line

from petl.experiments.sweeps import forked_runs
from petl.experiments.sweeps.forked_runs import ForkedRuns

pytest_plugins = ["training_fixtures"]
pytestmark = pytest.mark.skipif(not forked_runs.FORKS, reason="no fork")
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(forked_runs, "FORKING", (warm_python.python(), *forked_runs.FORKING[1:]))
    runs = ForkedRuns(dict(os.environ))
    yield runs
    runs.close()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(metrics: Path) -> None:
    """Wait for the first line of a run's metrics."""
    until = time.monotonic() + 200
    while time.monotonic() < until and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)


@pytest.mark.thorough
@pytest.mark.parametrize("words", [["+method=lora"], ["+method=sparse", "train.eval_steps=2"]])
def test_a_forked_run_is_to_the_bit_one_of_its_own_process(tiny, tmp_path, forked, words):
    for seed in (0, 1):  # the second one follows another run
        given = [*tiny.classify, *words, f"train.seed={seed}"]
        one, other = (Finished(tmp_path / f"{name}-{seed}") for name in ("forked", "alone"))
        forked.run([*given, f"train.run={one.path}"], tmp_path / f"{seed}.log")
        line = command_line([*given, f"train.run={other.path}"], python=warm_python.python())
        subprocess.run(line, check=True, capture_output=True)
        assert (one.path / WEIGHTS).read_bytes() == (other.path / WEIGHTS).read_bytes()
        assert one.scores["after"] == other.scores["after"]
        losses = [[line.get("loss") for line in run.metrics] for run in (one, other)]
        assert losses[0] == losses[1]
        assert "saved in" in (tmp_path / f"{seed}.log").read_text()


# runs that take some seconds, without the libraries
SLEEPING = """
import time, petl.cli.train_forked as forked
forked.IMPORTED = ()
forked.petl = lambda words: time.sleep(float(words[1])) or print("ended", flush=True)
forked.main()
"""


@pytest.mark.cells(1)
@pytest.mark.parametrize("victim", ["run", "server", "both", "asked"])
def test_a_run_that_ends_early_ends_no_other(tmp_path, monkeypatch, victim):
    """Neither does the end of the process that forks them."""
    monkeypatch.setattr(forked_runs, "FORKING", (sys.executable, "-c", SLEEPING))
    runs = ForkedRuns(dict(os.environ))
    thread = threading.Thread(target=runs.run, args=(["1000"], tmp_path / "long.log"))
    thread.start()
    until, found = time.monotonic() + 100, []
    while time.monotonic() < until and not found:
        time.sleep(0.05)
        found = children(runs._process.pid) if runs._process is not None else []
    if victim == "asked":
        runs.terminate()
    if victim in ("server", "both"):
        os.kill(runs._process.pid, signal.SIGKILL)
    if victim in ("run", "both"):
        os.kill(found[0], signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive()
    runs.run(["0"], tmp_path / "next.log")
    assert (tmp_path / "next.log").read_text() == "ended\n"
    runs.close()
    if victim == "server":
        os.kill(found[0], signal.SIGKILL)


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_study_saves_its_run_and_goes_on_by_the_same_command(tiny, tmp_path, number):
    line = [sys.executable, "-m", "petl", "study", str(tmp_path / "study"), "--methods", "lora"]
    line += ["--seeds", "0", *tiny.steady, "train.steps=3000", "train.save_steps=null"]
    study = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "study/runs/lora/seed-0"
    wait_for(run / "metrics.jsonl")
    study.send_signal(number)  # to this process alone, not to its group
    _, err = study.communicate(timeout=120)
    assert study.returncode == 128 + number, err
    assert f"to continue, with finished runs kept: petl study {tmp_path / 'study'}" in err
    steps = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [*(run / "checkpoints").iterdir()]
    assert steps < 3000
