"""Damage at random places of the binary files that petl reads back is never used in silence.

A few faults of each kind of file; tests/scripts/test_chaos.py has a thousand of all kinds.
`test_damaged_runs.py` does the same to the text files of a run.
"""

import random

import pytest
from chaos_files import KINDS, Damaged


@pytest.mark.cells(3)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_refused_or_change_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    damaged, draw = Damaged(kind, tmp_path / "files"), random.Random(kind)
    for _ in range(5):
        damaged.hit(draw)
