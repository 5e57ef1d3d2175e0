"""The section of copied answers on a tiny model: each drafter, by what is copied, with its goal."""

import pytest
from bench.copied import KINDS, NAMES, measure
from bench.records import Result
from bench.report import tables


@pytest.mark.thorough
def test_a_copy_takes_fewer_passes_than_unrelated_text():
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    records = measure(texts=1, tokens=24, **small, vocab_size=64)
    assert len(records) == len(KINDS) * len(NAMES)
    assert not [record.failed for record in records if record.failed]
    each_pass = {
        record.shape.rpartition(", ")[2]: record.facts["tokens / pass"] for record in records
    }
    assert each_pass["copy"] > 2 > each_pass["unrelated"]
    found = tables(Result({}, records))
    assert [table.rows[0][0] for table in found.values()] == ["aggressive"] * 3
    assert all("goal: time / plain" in table.columns for table in found.values())
