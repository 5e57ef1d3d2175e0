"""Columns of encoded rows are read as row by row, also of rows that are selected."""

from datasets import Dataset

from petl.data.overlap import input_texts
from petl.data.tasks.encoding_cache import sizes_of, values_of

ROWS = 2_503  # more than are read at once
LISTS = [list(range(number % 7)) for number in range(ROWS)]


def test_values_and_sizes_are_those_of_each_row():
    rows = Dataset.from_dict({"ids": LISTS, "number": range(ROWS)})
    chosen = [*range(ROWS - 1, 0, -3)]
    for data, order in ((rows, range(ROWS)), (rows.select(chosen), chosen)):
        assert list(values_of(data, "number")) == [*order]
        assert list(values_of(data, "ids")) == [LISTS[number] for number in order]
        assert sizes_of(data, "ids") == [len(LISTS[number]) for number in order]
    assert sizes_of(rows.select([]), "ids") == []


def test_inputs_of_raw_rows_are_texts_or_json():
    words = {"text": ["a", "b"], "more": [{"role": "user"}, {"role": None}], "label": [0, 1]}
    rows = Dataset.from_dict(words)
    assert list(input_texts(rows, ("text", "more"))) == [
        'a\x1f{"role": "user"}',
        'b\x1f{"role": null}',
    ]
