"""Section `tokens` on a small model: every way to leave something out, beside none."""

import pytest
from bench.long_rows import GOALS, ROWS, measure


@pytest.mark.thorough
def test_each_way_has_its_time_and_memory():
    small = {"hidden_size": 36, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}
    records = measure(1, tokens=512, **small)
    assert [record.row for record in records] == list(ROWS)
    for record in records:
        assert record.facts == GOALS
        assert record.ratios["time / LoRA"].median > 0
        assert record.counts["peak MB"] > 0
