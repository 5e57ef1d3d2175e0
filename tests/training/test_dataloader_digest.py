"""The hash of training rows is that of their values in the format "numpy" of datasets."""

import hashlib

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features, List, Value

from petl.data.tasks.base import NON_INPUT_PREFIX
from petl.training.dataloader import digest

LISTS = [[1, 2, 3], [], [4], [5, 6]]
COLUMNS = {
    "token ids": (LISTS, List(Value("int64"))),
    "masks": (LISTS, List(Value("int8"))),
    "unsigned": (LISTS, List(Value("uint32"))),
    "floats": ([[0.1, 2], [], [1e-9], [3]], List(Value("float32"))),
    "doubles": ([[0.1, 2], [], [1e-9], [3]], List(Value("float64"))),
    "bools": ([[True], [False, True], [], [True]], List(Value("bool"))),
    "label": ([0, 2, 1, 0], Value("int64")),
    "small label": ([0, 2, 1, 0], Value("int32")),
    "number": ([0.1, 2.0, 1.0, 0.5], Value("float64")),
    "half": ([0.1, 2.0, 1.0, 0.5], Value("float32")),
    "flag": ([True, False, True, True], Value("bool")),
    "text": (["a", "", "cd", "e"], Value("string")),
    "no number": ([0.1, None, 1.0, 0.5], Value("float64")),
    "no integer": ([[1, None], [2], [3], [4]], List(Value("int64"))),
    "pairs": ([[[1, 2], [3, 4]]] * 4, List(List(Value("int64")))),
    "images": (
        np.arange(24, dtype=np.float32).reshape(4, 2, 3).tolist(),
        Array2D((2, 3), "float32"),
    ),
}


def by_loop(rows: Dataset) -> str:
    """Row by row, in the format "numpy" of datasets."""
    sample = rows.select(range(0, len(rows), max(1, len(rows) // 1000))).with_format("numpy")
    hasher = hashlib.sha256(str(len(rows)).encode())
    for row in sample:
        for name, value in sorted(row.items()):
            if not name.startswith(NON_INPUT_PREFIX):
                array = np.asarray(value)
                hasher.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hasher.hexdigest()


def dataset(*names: str, repeats: int = 1) -> Dataset:
    columns = {name.replace(" ", "_"): COLUMNS[name] for name in names}
    values = {name: values * repeats for name, (values, _) in columns.items()}
    return Dataset.from_dict(values, Features({name: kind for name, (_, kind) in columns.items()}))


@pytest.mark.cells(3)
@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_is_hashed_as_the_format_has_it(name):
    rows = dataset(name)
    assert digest(rows) == by_loop(rows)


def test_columns_are_hashed_row_by_row_whatever_their_order_and_those_of_no_input_not_at_all():
    rows = dataset("token ids", "label", "masks", "images", "number")
    assert digest(rows) == by_loop(rows)
    assert digest(rows.select_columns(sorted(rows.column_names, reverse=True))) == digest(rows)
    assert digest(rows.add_column(f"{NON_INPUT_PREFIX}note", ["x"] * 4)) == digest(rows)


@pytest.mark.thorough
def test_of_many_rows_some_are_hashed_also_after_a_selection():
    rows = dataset("token ids", "label", repeats=600)
    assert digest(rows) == by_loop(rows)
    chosen = rows.select(range(2399, 100, -1))
    assert digest(chosen) == by_loop(chosen)
    assert digest(chosen) != digest(rows)


@pytest.mark.parametrize("name", ["token ids", "doubles", "small label", "images"])
def test_a_changed_value_changes_the_hash(name):
    rows = dataset(name)
    assert digest(rows.select([0, 1, 3, 2])) != digest(rows)
    assert digest(rows.select([0, 1, 2])) != digest(rows)
