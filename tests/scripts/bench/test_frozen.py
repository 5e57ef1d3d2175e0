"""The section of frozen blocks: the same model with and without a store."""

from dataclasses import replace

import pytest
from bench.frozen import measure, measure_images
from bench.records import Result
from bench.report import tables
from bench.shapes import LLAMA


def test_upper_blocks_are_measured_with_and_without_a_store():
    small = {"hidden": 32, "heads": 2, "kv_heads": 1, "ff": 48, "layers": 3, "vocabulary": 64}
    found = measure(replace(LLAMA, **small, rows=2, length=6), 2)
    # a third and a quarter of three blocks are one, and so is top:1
    record, labelled = found
    assert record.row == "lora in the last 1 of 3"
    assert set(record.ratios) == {"time / floor", "without a store / floor"}
    assert record.facts["B / position"] == 4 * 32
    assert labelled.row == "lora, 20% of the positions labelled"
    assert set(labelled.ratios) == {
        "time / floor",
        "head alone / floor",
        "all positions / floor",
    }
    (table,) = tables(Result({}, found)).values()
    assert table.rows[0][0] == "lora in the last 1 of 3"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_images_have_a_row_for_each_share():
    found = measure_images(1, num_hidden_layers=6, hidden_size=32, image_size=32, patch_size=8)
    assert [record.row for record in found] == [
        "lora in the last 2 of 6",
        "lora in the last 1 of 6",
    ]
