"""Tables of made-up records."""

from bench.clocks import Spread
from bench.records import Record
from bench.report import FAIL, NOISY, remarks, tables
from bench_records import MOLA, PEER, STEADY, WRONG, result

FILES = "adapter files; wrapping, saving, loading, merging: minilm"


def test_there_is_a_table_for_each_section_and_shape():
    other = Record("file", "minilm", "mola", counts={"bytes": 1234567.0})
    found = tables(result(STEADY, MOLA, other))
    assert list(found) == ["training step: llama", FILES]
    assert found[FILES].rows == [["mola", "1,234,567"]]


def test_values_are_in_their_columns_under_full_names():
    table = tables(result(STEADY, MOLA))["training step: llama"]
    assert table.columns[0] == ""
    cells = dict(zip(table.columns, table.rows[1], strict=True))
    assert cells == {
        "": "mola",
        "time / lower bound": "1.28 (1.27-1.30)",
        "kernel launches per adapted layer": "38",
        "FLOPs / lower bound": "1.22",
        "optimizer (ms)": "0.456",
    }


def test_a_failed_row_has_no_values():
    table = tables(result(MOLA, WRONG, PEER))["training step: llama"]
    assert table.rows[1] == ["mos", FAIL, "", "", ""]
    assert table.rows[2] == ["xlora", "-", "", "", ""]
    assert remarks(result(MOLA, WRONG)) == ["step, llama, mos: the loss is off by 1e-02"]


def test_an_unsteady_lower_bound_is_marked():
    shaky = Record("step", "llama", "floor", ratios={"time / floor": Spread(1.0, 0.9, 1.1)})
    table = tables(result(shaky, MOLA))["training step: llama"]
    assert table.rows[0][0] == f"frozen-backbone lower bound {NOISY}"
    assert remarks(result(shaky))[0].startswith(NOISY)
    assert not remarks(result(STEADY))
