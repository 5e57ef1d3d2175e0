"""The section of frozen blocks: with and without a store, and with what is read alone."""

from dataclasses import replace

import pytest
from bench.frozen import CLS, FEW, LABELLED, measure, measure_images
from bench.records import Result
from bench.report import tables
from bench.shapes import LLAMA, MINILM

SMALL = {"hidden": 32, "heads": 2, "ff": 48, "layers": 3, "vocabulary": 64, "rows": 2}


@pytest.mark.thorough
def test_upper_blocks_are_measured_with_and_without_a_store():
    found = measure(replace(LLAMA, **SMALL, kv_heads=1, length=10), 2)
    # a third and a quarter of three blocks are one, and so is top:1
    record, few, labelled = found
    assert record.row == "lora in the last 1 of 3"
    assert few.row == f"lora in the last 1 of 3, {FEW}"
    assert labelled.row == f"lora, {FEW}"
    for each in (record, few):
        assert set(each.ratios) == {"time / floor", "without a store / floor"}
        assert each.facts["B / position"] == 4 * 32
    assert set(labelled.ratios) == {
        "time / floor",
        "head alone / floor",
        "all positions / floor",
    }
    (table,) = tables(Result({}, found)).values()
    assert table.rows[0][0] == "lora in the last 1 of 3"
    assert f"{LABELLED:.0%} of" in FEW


@pytest.mark.thorough
def test_an_encoder_is_also_measured_as_a_classifier_that_reads_one_position():
    shape = replace(MINILM, **{**SMALL, "layers": 6}, kv_heads=2, length=6)
    found = measure(shape, 1)
    parts = [f"lora in the last {count} of 6" for count in (2, 1)]
    assert [record.row for record in found] == [*parts, *(f"{part}, {CLS}" for part in parts)]
    goals = [record.facts["goal"] for record in found]
    assert goals == [0.40, 0.21, 0.28, 0.09]
    # another lower bound, so another table
    assert len(tables(Result({}, found))) == 2


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_images_have_a_row_for_each_share():
    found = measure_images(1, num_hidden_layers=6, hidden_size=32, image_size=32, patch_size=8)
    assert [(record.row, record.facts.get("goal")) for record in found] == [
        ("lora in the last 2 of 6", 0.41),
        ("lora in the last 1 of 6", None),
        (f"lora in the last 2 of 6, {CLS}", 0.33),
        (f"lora in the last 1 of 6, {CLS}", None),
    ]
