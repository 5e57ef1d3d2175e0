"""A thousand faults of seeds that are fixed: nothing is lost, and what is there has equal bits.

Most damage bytes of saved files in this process. Those of processes take ten seconds each: a run
from a store of frozen blocks, and a server, are killed a few times. By hand, `scripts/chaos.py`
tries more of them, and other jobs.
"""

import sys

import chaos
import pytest

pytest_plugins = ["training_fixtures"]
pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1200)]
IN_FILES, IN_RUNS, IN_SERVERS = 994, 4, 2  # 1,000 faults
KINDS = "kill -9 while saving,checkpoint with a flipped bit,clock back,cache with a flipped bit"


def of(monkeypatch, job, faults, *words):
    """The exit status of chaos.py."""
    line = ["chaos.py", "--job", job, "--faults", str(faults), *words]
    monkeypatch.setattr(sys, "argv", line)
    return chaos.main()


def test_damaged_bytes_of_files(monkeypatch):
    assert of(monkeypatch, "files", IN_FILES) == 0


def test_faults_of_a_run_with_a_store(tiny, monkeypatch, tmp_path):
    settings = ["data.train_rows=48", "data.test_rows=8", "train.steps=40"]
    settings += ["method.layers_to_transform=[1]"]
    words = ["--kinds", KINDS, "--within", "0.2", "--folder", str(tmp_path)]
    assert of(monkeypatch, "stored", IN_RUNS, *words, *tiny.steady, *settings) == 0


def test_faults_of_a_server(monkeypatch):
    assert of(monkeypatch, "serve", IN_SERVERS) == 0
