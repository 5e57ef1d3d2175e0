"""Tables that are written while their rows are made."""

import csv
import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from petl.errors import InputError
from petl.generation.prediction.tables import new_table


def write(path, *windows, schema=None):
    with new_table(path, schema) as table:
        for rows in windows:
            table.write(rows)
    return path


def test_csv_has_a_header_and_json_in_cells_that_are_no_text(tmp_path):
    rows = [{"a": "x, y", "b": None, "c": ["é", 1]}, {"a": 'say "no"', "b": 2.5, "c": {"k": True}}]
    text = write(tmp_path / "t.csv", rows[:1], rows[1:]).read_text()
    assert text == 'a,b,c\n"x, y",,"[""é"", 1]"\n"say ""no""",2.5,"{""k"": true}"\n'
    assert write(tmp_path / "t.tsv", [{"a": "x", "b": 1}]).read_text() == "a\tb\nx\t1\n"


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_line_breaks_of_any_kind_stay_in_their_cell(tmp_path, suffix):
    rows = [{"a": "x\ry", "b": "1"}, {"a": "p\r\nq\n", "b": "\r"}, {"a": "", "b": "\r\n"}]
    file = write(tmp_path / f"t{suffix}", rows[:1], rows[1:])
    with file.open(newline="") as opened:
        found = list(csv.DictReader(opened, delimiter="," if suffix == ".csv" else "\t"))
    assert found == rows
    assert file.read_bytes().splitlines(keepends=True)[0] in (b"a,b\n", b"a\tb\n")


def test_json_lines_keep_dates_and_escape_what_a_terminal_obeys(tmp_path):
    row = {"d": datetime.date(2024, 5, 6), "n": decimal.Decimal("1.10"), "t": "\x9b1m é"}
    text = write(tmp_path / "t.jsonl", [row], [{"other": 1}]).read_text()
    first, second = map(json.loads, text.splitlines())
    assert first == {"d": "2024-05-06", "n": "1.10", "t": "\x9b1m é"}
    assert second == {"other": 1}
    assert "\x9b" not in text
    assert "é" in text


def test_parquet_keeps_the_types_of_its_input(tmp_path):
    fields = {
        "kind": pa.dictionary(pa.int32(), pa.string()),
        "when": pa.timestamp("ms", "UTC"),
        "price": pa.decimal128(9, 2),
        "small": pa.int8(),
        "raw": pa.binary(),
    }
    when = datetime.datetime(2024, 5, 6, tzinfo=datetime.UTC)
    row = {"kind": "a", "when": when, "price": decimal.Decimal("1.10"), "small": 3, "raw": b"\0"}
    file = write(
        tmp_path / "t.parquet", [{**row, "p": None}], [{**row, "p": "x"}], schema=pa.schema(fields)
    )
    assert {f.name: f.type for f in pq.read_schema(file)} == {**fields, "p": pa.string()}
    assert pq.read_table(file).to_pylist() == [{**row, "p": None}, {**row, "p": "x"}]


NESTED = {"a": [{"k": {"x": 1}}]}


@pytest.mark.parametrize(
    ("suffixes", "windows", "words"),
    [
        (".csv .tsv .parquet", [[{"a": 1}], [{"a": 1, "b": 2}]], "'b'"),
        (".parquet", [[NESTED], [{"a": [{"k": {"x": 1, "y": 2}}]}]], r"'a'.*'y'.*\.jsonl"),
        (".parquet", [[{"a": 1}], [{"a": "x"}]], r"types.*\.jsonl"),
        (".parquet", [[{"a": 1}, {"a": "x"}]], "one type"),
        (".jsonl .csv .tsv", [[{"a": b"x"}]], r"bytes.*\.parq"),
    ],
)
def test_what_a_format_cannot_hold_is_named_and_no_file_is_left(tmp_path, suffixes, windows, words):
    for suffix in suffixes.split():
        with pytest.raises(InputError, match=words):
            write(tmp_path / f"t{suffix}", *windows)
    assert list(tmp_path.iterdir()) == []
    assert pq.read_table(write(tmp_path / "t.parquet", [NESTED], [{"a": None}])).num_rows == 2
