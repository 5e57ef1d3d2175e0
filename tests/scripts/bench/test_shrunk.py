"""The section of shrunk models: what is left is counted, and it has a table with its goals."""

from dataclasses import replace

import pytest
from bench.records import Result
from bench.report import tables
from bench.shapes import MINILM
from bench.shrunk import measure


@pytest.mark.thorough
def test_multiplications_that_are_left_are_those_of_half_the_channels():
    shape = replace(MINILM, layers=2, hidden=64, heads=4, kv_heads=4, ff=256, vocabulary=64)
    (record,) = measure(replace(shape, rows=2, length=16), 2, batches=2)
    # of a block: 4 D^2 of attention and 2 D F, of which half stays; attention itself, and the head
    assert 0.6 < record.counts["multiplications left"] < 0.7
    assert record.facts["goal dense"] == pytest.approx(record.counts["multiplications left"] + 0.05)
    assert set(record.ratios) == {"time / dense", "time / passes"}
    (table,) = tables(Result({}, [record])).values()
    assert table.rows[0][0] == "sparsity 0.5"
