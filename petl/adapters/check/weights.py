"""Tensors of a safetensors file without torch: the file may come from a stranger."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from petl.errors import InputError, first_line

LENGTH = 8  # bytes in front of the header: its length, little-endian
# numpy has no bfloat16: its bits are the upper half of a float32
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?", "U8": "<u1"}
NUMPY |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1"}


class Stored(NamedTuple):
    """A tensor in a file: its dtype as the file names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it is of a floating-point type."""
        return "F" in self.dtype


class Figures(NamedTuple):
    """What is asked of a tensor's values.

    Attributes:
        broken: number of entries that are infinite or NaN.
        norm, largest: of the others.
        equal: it is a matrix of 8 columns or more of which each row repeats one value, not 0.
    """

    broken: int
    norm: float
    largest: float
    equal: bool


class TensorFile:
    """The header of a safetensors file, and its tensors one by one.

    Raises:
        InputError: it is no safetensors file, its size is not that of its header, or a tensor is of
            a dtype that no adapter has.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            # safetensors checks the header: sizes, offsets, its own length
            with safe_open(file, framework="np") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                self.stored = {
                    name: Stored(each.get_dtype(), tuple(each.get_shape()))
                    for name, each in slices.items()
                }
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} is damaged, or no safetensors file: {first_line(error)}"
            ) from error
        for name, each in self.stored.items():
            if each.dtype not in NUMPY:
                known = ", ".join(NUMPY)
                raise InputError(f"{file}: {name} is of dtype {each.dtype}; adapters have {known}")
        self._figures: dict[str, Figures] = {}

    @cached_property
    def _content(self) -> tuple[dict[str, Any], Any]:
        """Its header, and the bytes of its tensors."""
        with self.file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH), "little")
            header = json.loads(opened.read(length))
        return header, np.memmap(self.file, np.uint8, "r", LENGTH + length)

    def values(self, name: str) -> np.ndarray:
        """Return a tensor as a numpy array; bfloat16 as float32."""
        header, content = self._content
        start, end = header[name]["data_offsets"]
        part = content[start:end].view(NUMPY[self.stored[name].dtype])
        if self.stored[name].dtype == "BF16":
            part = (part.astype(np.uint32) << 16).view(np.float32)
        return part.reshape(self.stored[name].shape)

    def figures(self, name: str) -> Figures:
        """Return the figures of a tensor, which is read once."""
        if name not in self._figures:
            values = self.values(name).astype(np.float32)
            finite = values[np.isfinite(values)]
            wide = values.ndim == 2 and values.shape[1] >= 8
            self._figures[name] = Figures(
                broken=values.size - finite.size,
                norm=float(np.linalg.norm(finite.astype(np.float64))),
                largest=float(np.abs(finite).max(initial=0)),
                equal=bool(wide and values.any() and (values == values[:, :1]).all()),
            )
        return self._figures[name]

    def is_zero(self, name: str) -> bool:
        """Return True if all entries of a tensor are zero."""
        return self.stored[name].is_float and not self.figures(name).largest
