"""A hash of training rows, by which a resumed run knows them again."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from pyarrow import types

from petl.data.streaming import StreamedRows
from petl.training.dataloader import batched

SAMPLE = 1000  # rows; at most about twice as many


def digest(rows: Dataset | StreamedRows) -> str:
    """Hash the number of rows and a thousand of them; of a stream, the first hundred.

    It tells a resumed run whether its training examples have changed.
    """
    if isinstance(rows, StreamedRows):
        rows = rows.first_rows(100)
    sample = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLE)))  # evenly spaced
    hasher = hashlib.sha256(str(len(rows)).encode())
    names = sorted(batched(rows))
    for arrays in zip(*(arrays_of(sample.select_columns([n])) for n in names), strict=True):
        for name, array in zip(names, arrays, strict=True):
            # dtype and shape are hashed: bytes alone are ambiguous
            hasher.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hasher.hexdigest()


def arrays_of(column: Dataset) -> Iterator[np.ndarray]:
    """The values of a dataset's only column as its format "numpy" has them: int64 and float32.

    That format takes most of a millisecond per value. Numbers and lists of them, such as labels and
    token ids, need not; single numbers keep their type.
    """
    (chunks,) = column.with_format("arrow")[:].columns
    values: Any = chunks.combine_chunks()
    if is_numbers(values):
        return iter(np.asarray(value) for value in values.to_numpy())
    if types.is_list(values.type) and values.null_count == 0 and is_numbers(values.flatten()):
        dtype = np.int64 if types.is_integer(values.type.value_type) else np.float32
        ends = np.cumsum(values.value_lengths().to_numpy())
        arrays = np.split(values.flatten().to_numpy().astype(dtype), ends[:-1])
        return iter(arrays[: len(values)])
    return (np.asarray(row[name]) for row in column.with_format("numpy") for name in row)


def is_numbers(values: pa.Array) -> bool:
    """True for integers or floats without nulls."""
    number = types.is_integer(values.type) or types.is_floating(values.type)
    return number and values.null_count == 0
