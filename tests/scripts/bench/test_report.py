"""Tables of made-up records."""

from bench.clocks import Spread
from bench.records import Record
from bench.report import FAIL, NOISY, remarks, tables
from bench_records import MOLA, PEER, STEADY, WRONG, result


def test_there_is_a_table_for_each_section_and_shape():
    other = Record("file", "minilm", "mola", counts={"bytes": 1234567.0})
    found = tables(result(STEADY, MOLA, other))
    assert list(found) == ["training step: llama", "files, and putting adapters in place: minilm"]
    assert found["files, and putting adapters in place: minilm"].rows == [["mola", "1,234,567"]]


def test_figures_stand_in_their_columns():
    table = tables(result(STEADY, MOLA))["training step: llama"]
    assert table.columns[0] == ""
    cells = dict(zip(table.columns, table.rows[1], strict=True))
    assert cells == {
        "": "mola",
        "time / floor": "1.28 (1.27-1.30)",
        "kernels / layer": "38",
        "FLOPs / floor": "1.22",
        "optimizer ms": "0.456",
    }


def test_a_row_that_fails_has_no_figures():
    table = tables(result(MOLA, WRONG, PEER))["training step: llama"]
    assert table.rows[1] == ["mos", FAIL, "", "", ""]
    assert table.rows[2] == ["xlora", "-", "", "", ""]
    assert remarks(result(MOLA, WRONG)) == ["step, llama, mos: the loss is off by 1e-02"]


def test_a_floor_that_is_not_steady_is_marked():
    shaky = Record("step", "llama", "floor", ratios={"time / floor": Spread(1.0, 0.9, 1.1)})
    table = tables(result(shaky, MOLA))["training step: llama"]
    assert table.rows[0][0] == f"floor {NOISY}"
    assert remarks(result(shaky))[0].startswith(NOISY)
    assert not remarks(result(STEADY))
