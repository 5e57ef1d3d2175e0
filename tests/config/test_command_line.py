"""The commands that a run prints and saves: as it was started, in a checkout or installed."""

import sys

import pytest

from petl.config.command_line import in_shell


@pytest.mark.parametrize(
    ("started_as", "processes", "printed"),
    [
        ("train.py", 1, "python train.py +method=lora"),
        ("/a/train.py", 2, "torchrun --nproc_per_node 2 /a/train.py +method=lora"),
        ("/env/bin/petl", 1, "petl train +method=lora"),
        ("/env/lib/petl/__main__.py", 1, "python -m petl train +method=lora"),
        ("/env/lib/petl/__main__.py", 2, "torchrun --nproc_per_node 2 -m petl train +method=lora"),
        # a worker that a launcher of Hydra started
        ("/env/lib/submitit/core/_submit.py", 1, "petl train +method=lora"),
    ],
)
def test_a_command_names_the_program_that_was_started(monkeypatch, started_as, processes, printed):
    monkeypatch.setattr(sys, "argv", [started_as])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert in_shell(["+method=lora"]) == printed
