"""Tensors of a safetensors file by numpy alone: the file may come from a stranger."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from petl.errors import InputError
from petl.system.files.disk import open_inside
from petl.system.files.read import parse_json, with_shape

MAX_HEADER = 2**26  # bytes; that of an adapter with 100,000 tensors has 12 MB
LENGTH = 8  # bytes in front of the header: its length, little-endian
# numpy has no bfloat16: its bits are the upper half of a float32
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}


class Stored(NamedTuple):
    """A tensor in a file: dtype, shape, and the bytes that it has there."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_float(self) -> bool:
        """Whether it is of a floating-point type."""
        return "F" in self.dtype


class Figures(NamedTuple):
    """What is asked of a tensor's values; all in float32.

    Attributes:
        broken: number of entries that are infinite or NaN.
        norm, largest: of the others.
        equal: every row has one value only, which is not 0.
    """

    broken: int
    norm: float
    largest: float
    equal: bool


class TensorFile:
    """The header of a safetensors file, and its tensors one by one.

    Raises:
        InputError: it is no regular file inside its folder, or no safetensors file; its size is not
            that of its header.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with open_inside(file) as opened:
                size = file.stat().st_size
                length = int.from_bytes(opened.read(LENGTH), "little")
                if not 2 <= length <= min(MAX_HEADER, size - LENGTH):
                    raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
                content = parse_json(opened.read(length).decode())
            self.offset = LENGTH + length
            self.stored = _stored(content, size - self.offset)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} is damaged, or no safetensors file: {error}") from error
        self._figures: dict[str, Figures] = {}

    @cached_property
    def _content(self) -> Any:
        return np.memmap(self.file, np.uint8, "r", self.offset)

    def values(self, name: str) -> Any:
        """Return a tensor as a numpy array; bfloat16 as float32."""
        stored = self.stored[name]
        part = self._content[stored.start : stored.end].view(NUMPY[stored.dtype])
        if stored.dtype == "BF16":
            part = (part.astype(np.uint32) << 16).view(np.float32)
        return part.reshape(stored.shape)

    def figures(self, name: str) -> Figures:
        """Return the figures of a tensor, which is read once."""
        if name not in self._figures:
            values = self.values(name).astype(np.float32).reshape(-1)
            finite = np.isfinite(values)
            broken = values.size - int(np.count_nonzero(finite))
            values = values[finite] if broken else values
            largest = float(np.abs(values).max(initial=0))
            norm = float(np.linalg.norm(values.astype(np.float64)))
            self._figures[name] = Figures(broken, norm, largest, _equal(self.values(name)))
        return self._figures[name]

    def is_zero(self, name: str) -> bool:
        """Return True if all entries of a tensor are zero."""
        return self.stored[name].is_float and not self.figures(name).largest


def _equal(values: Any) -> bool:
    """Return True for a matrix of at least 8 columns of which each row repeats one value."""
    if values.ndim != 2 or values.shape[1] < 8 or not values.shape[0]:
        return False
    return bool((values == values[:, :1]).all() and values.any())


def _stored(content: Any, size: int) -> dict[str, Stored]:
    """Return the tensors of a header.

    Raises:
        ValueError: they are not those of a file with `size` bytes of data.
    """
    found = {}
    for name, entry in with_shape(content, dict[str, dict[str, Any]]).items():
        if name == "__metadata__":
            continue
        shape = tuple(with_shape(entry.get("shape"), list[int]))
        start, end = with_shape(entry.get("data_offsets"), list[int])
        dtype = entry.get("dtype")
        if dtype not in NUMPY:
            raise ValueError(f"{name} is of dtype {dtype}; adapters have {', '.join(NUMPY)}")
        width = np.dtype(NUMPY[dtype]).itemsize
        if min((0, *shape)) < 0 or not 0 <= start <= end <= size:
            raise ValueError(f"{name} of shape {list(shape)} lies at {start}:{end} of {size:,}")
        if end - start != math.prod(shape) * width:
            raise ValueError(f"{name} of shape {list(shape)} has {end - start:,} bytes")
        found[name] = Stored(dtype, shape, start, end)
    if sum(each.end - each.start for each in found.values()) != size:
        raise ValueError(f"its tensors are not of the {size:,} bytes behind its header")
    return found
