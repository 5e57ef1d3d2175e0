"""The section of merged tokens: its ratios are of the same model with and without merging."""

import pytest
from bench.merging import measure
from bench.records import Result
from bench.report import tables


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.thorough
def test_merged_tokens_save_activations_and_have_a_table():
    small = {"num_hidden_layers": 2, "image_size": 64, "patch_size": 8}  # 65 tokens
    found = measure(2, {64: 1}, schedules={"half": [32, 16]}, **small)
    (record,) = found
    assert record.row == "pyra, half"
    # 33 and 17 of 65 tokens are behind attention
    assert 0.2 < record.counts["saved / inner"] < 0.8
    assert set(record.ratios) == {"time / base", "time / plain merging", "step / inner"}
    (table,) = tables(Result({}, found)).values()
    assert table.rows[0][0] == "pyra, half"
