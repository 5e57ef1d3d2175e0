"""Section `cache` of the benchmark: records of tokens behind prompts."""

from dataclasses import replace

import pytest
from bench import cached
from bench.shapes import LLAMA, MINILM


@pytest.mark.thorough
def test_answers_behind_cached_prompts_are_measured_and_taken_off_again():
    shape = replace(LLAMA, hidden=64, heads=1, kv_heads=1, ff=96, layers=2, vocabulary=200)
    records = cached.measure(shape, 2, sizes=((2, 20), (8, 90)))
    assert [record.row for record in records] == [
        "16 tokens after 2 x 20",
        "16 tokens after 8 x 90",
    ]
    assert not any(record.failed for record in records)
    assert all(record.ratios["time / copied"].median > 0 for record in records)
    assert cached.measure(MINILM, 1) == []
