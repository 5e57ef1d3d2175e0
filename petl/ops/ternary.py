"""A state of which some tensors are coded as positions, signs and one magnitude, and its file.

Symbols: tau = state - reference, flattened in float32 and laid end to end in the order of the
names.

The file is a safetensors file that may come from a stranger: the tensor `petl_ternary_code` (uint8)
and those that are not coded, under their own names; in the metadata, `petl_ternary` is the JSON of
`TernaryRecord`. In format 1 all of tau is one code. In format 2, for tensors of different
densities, each tensor has a code with a parameter of its own; the codes, each of whole bytes, are
in the order of the names, and `b` and `bits` are lists.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from petl.errors import InputError, shown
from petl.ops import rice
from petl.system.files.paths import TERNARY
from petl.system.files.read import parse_json, with_shape
from petl.system.files.tensor_file import DTYPE_NAMES, DTYPES, check_finite, read_file

State = Mapping[str, Tensor]
FILE = TERNARY
CODE, METADATA = "petl_ternary_code", "petl_ternary"
TOGETHER, APART = FORMATS = (1, 2)  # one code of all tensors, or one of each
LARGEST = 2**40  # entries, more than any adapter has: their sums do not overflow


def restored(tau: Tensor, like: Tensor, name: str, reference: State | None) -> Tensor:
    """Return the tensor whose difference from its reference (None: 0) is `tau`, as `like`."""
    # summed in float32, then rounded once to the tensor's dtype
    value = tau if reference is None else tau + reference[name].float().flatten()
    return value.to(like.dtype).view(like.shape)


@dataclass(frozen=True)
class Ternary:
    """A state of which some tensors are coded as signs, positions and a magnitude.

    Attributes:
        shapes: dtype and shape of each coded tensor, by name.
        kept: by name, the number of entries that are not 0.
        sigma: by name, the standard deviation of tau; with scope "global" the same for all.
        scale: by name, the magnitude of the kept entries.
        positions: of the kept entries in tau, ascending.
        signs: of the kept entries, True for plus.
        others: the tensors that are not coded.
        settings: density, alpha and scope of `compress`.
        apart: each tensor has a code of its own, which is shorter if their densities differ.
    """

    shapes: dict[str, tuple[torch.dtype, torch.Size]]
    kept: dict[str, int]
    sigma: dict[str, float]
    scale: dict[str, float]
    positions: rice.Positions
    signs: rice.Signs
    others: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    apart: bool = False

    @property
    def numel(self) -> int:
        """Number of entries coded."""
        return sum(shape.numel() for _, shape in self.shapes.values())

    @cached_property
    def codes(self) -> list[tuple[rice.Bits, int, int]]:
        """Bytes, number of bits and parameter b of each code; one code in all unless `apart`."""
        runs = [(self.positions, self.signs, self.numel)]
        if self.apart:
            # positions in the tensor, not in tau
            runs = [
                (self.positions[own] - start, self.signs[own], end - start)
                for start, end, own in self.places.values()
            ]
        # b is not stored with the object: it follows from the density, and a file has its own
        found = [(p, s, rice.parameter(len(p), entries)) for p, s, entries in runs]
        return [(*rice.encode(positions, signs, b), b) for positions, signs, b in found]

    @property
    def bits(self) -> float:
        """Bits of the code for each entry coded."""
        return sum(bits for _, bits, _ in self.codes) / self.numel

    @cached_property
    def places(self) -> dict[str, tuple[int, int, slice]]:
        """By name: where a tensor begins and ends in tau, and which kept entries are its own."""
        # shapes are in the order of names, as tau is
        ends = np.cumsum([0, *(shape.numel() for _, shape in self.shapes.values())])
        # positions ascend, so each tensor's kept entries are one slice of them
        cuts = np.searchsorted(self.positions, ends)
        found = zip(ends[:-1], ends[1:], cuts[:-1], cuts[1:], strict=True)
        return {
            name: (int(start), int(end), slice(low, high))
            for name, (start, end, low, high) in zip(self.shapes, found, strict=True)
        }

    def tau(self, name: str) -> Tensor:
        """Return the coded difference of a tensor from its reference, [entries], float32."""
        start, end, own = self.places[name]
        dense = np.zeros(end - start, np.float32)
        # positions count from the beginning of tau, not of the tensor
        dense[self.positions[own] - start] = np.where(self.signs[own], 1, -1) * self.scale[name]
        return torch.from_numpy(dense)

    def dense(self, reference: State | None = None) -> dict[str, Tensor]:
        """Return the state: `reference` (None: 0) plus what is kept, and the tensors not coded."""
        coded = {
            name: restored(self.tau(name), torch.empty(shape, dtype=dtype), name, reference)
            for name, (dtype, shape) in self.shapes.items()
        }
        return {**coded, **self.others}

    def dot(self, other: "Ternary") -> float:
        """Return the inner product of the coded differences of two states of the same tensors.

        Raises:
            InputError: the other one has other tensors.
        """
        # dtypes may differ, since tau is float32 in both
        mine, theirs = ({n: s for n, (_, s) in x.shapes.items()} for x in (self, other))
        if mine != theirs:
            name = next(iter(mine.items() ^ theirs.items()))[0]
            raise InputError(f"the two have other tensors: {name} is not in both, of one shape")
        # entries kept by one state alone multiply 0
        _, one, two = np.intersect1d(
            self.positions, other.positions, assume_unique=True, return_indices=True
        )
        agree = np.where(self.signs[one] == other.signs[two], 1.0, -1.0)
        scales = [np.array([x.scale[name] for name in mine]) for x in (self, other)]
        ends = np.cumsum([shape.numel() for shape in mine.values()])
        # right: the position that equals an end is the first of the next tensor
        tensor = np.searchsorted(ends, self.positions[one], side="right")
        return float((agree * scales[0][tensor] * scales[1][tensor]).sum())

    def save(self, file: str | Path) -> None:
        """Write the file: the code, the tensors not coded, and the rest as metadata."""
        _write(self, Path(file))

    @classmethod
    def load(cls, file: str | Path) -> "Ternary":
        """Read a file of `save`.

        Raises:
            InputError: the file is damaged, or not of this format.
        """
        return _read(Path(file))


# The file


class TernaryRecord(TypedDict):
    """What the metadata say: a list has an entry for each coded tensor, in the order of names."""

    format: int
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    scales: list[float]
    sigmas: list[float]
    counts: list[int]
    density: float
    alpha: float | str
    scope: str
    b: int | list[int]
    bits: int | list[int]
    entries: int
    sha256: str


LISTS = ("shapes", "dtypes", "scales", "sigmas", "counts")


def _write(ternary: Ternary, file: Path) -> None:
    """Write a compressed state."""
    codes, each_bits, each_b = zip(*ternary.codes, strict=True)
    code = np.concatenate(codes)
    record = {
        "format": APART if ternary.apart else TOGETHER,
        "names": list(ternary.shapes),
        "shapes": [list(shape) for _, shape in ternary.shapes.values()],
        "dtypes": [DTYPE_NAMES[dtype] for dtype, _ in ternary.shapes.values()],
        "scales": list(ternary.scale.values()),
        "sigmas": list(ternary.sigma.values()),
        "counts": list(ternary.kept.values()),
        **ternary.settings,
        "b": list(each_b) if ternary.apart else each_b[0],
        "bits": list(each_bits) if ternary.apart else each_bits[0],
        "entries": len(ternary.positions),
        "sha256": hashlib.sha256(code.tobytes()).hexdigest(),
    }
    # safetensors refuses strided views
    others = {name: tensor.contiguous() for name, tensor in ternary.others.items()}
    tensors = {CODE: torch.from_numpy(code), **others}
    # "format" is what transformers and PEFT look for; metadata are strings only
    save_file(tensors, file, {"format": "pt", METADATA: json.dumps(record)})


def _read(file: Path) -> Ternary:
    """Read a compressed state, checked.

    Raises:
        InputError: the file is damaged, or of another format.
    """
    metadata, tensors = read_file(file)
    if METADATA not in metadata or CODE not in tensors:
        raise InputError(f"{file} is not a file of petl.deltas: it has no {METADATA}")
    record, code = _record(metadata[METADATA], file), tensors.pop(CODE)
    if code.dtype != torch.uint8 or code.dim() != 1:
        raise _damaged(file, f"{CODE} is not a list of bytes")
    stored = code.numpy()
    # against damage, not attack: who changes the code can change the sum as well
    if hashlib.sha256(stored.tobytes()).hexdigest() != record["sha256"]:
        raise _damaged(file, "its code has another sha256 than its metadata say")
    # `dense` would let a tensor stored plain replace a coded one
    twice = sorted({*record["names"]} & tensors.keys())
    if twice:
        raise _damaged(file, f"{twice[0]} is there twice")
    check_finite(tensors, str(file))
    names = record["names"]
    positions, signs = _decoded(record, stored, file)
    dtypes = (DTYPES[name] for name in record["dtypes"])
    found = Ternary(
        dict(zip(names, zip(dtypes, map(torch.Size, record["shapes"]), strict=True), strict=True)),
        dict(zip(names, record["counts"], strict=True)),
        dict(zip(names, record["sigmas"], strict=True)),
        dict(zip(names, record["scales"], strict=True)),
        positions,
        signs,
        tensors,
        {"density": record["density"], "alpha": record["alpha"], "scope": record["scope"]},
        record["format"] == APART,
    )
    for name, (_, _, own) in found.places.items():
        # totals agree by now; this finds entries that belong to another tensor
        if own.stop - own.start != found.kept[name]:
            raise _damaged(file, f"{name} has other entries than its metadata say")
    return found


def _decoded(
    record: TernaryRecord, stored: rice.Bits, file: Path
) -> tuple[rice.Positions, rice.Signs]:
    """Return positions in tau and signs of the kept entries of a file whose record was checked."""
    # the sum is below LARGEST, so these are valid sizes
    sizes = [prod(shape) for shape in record["shapes"]]
    b, bits = record["b"], record["bits"]
    if isinstance(b, int) and isinstance(bits, int):
        return rice.decode(stored, bits, record["entries"], sum(sizes), b, file)
    assert isinstance(b, list), "checked by `_check`"
    assert isinstance(bits, list), "checked by `_check`"
    lengths = [-(-count // 8) for count in bits]
    if sum(lengths) != len(stored):
        raise _damaged(file, f"{CODE} has {len(stored)} bytes for codes of {sum(lengths)}")
    codes = np.split(stored, np.cumsum(lengths)[:-1])
    # where each tensor begins in tau
    starts = np.cumsum([0, *sizes[:-1]])
    found = [
        rice.decode(*run, file) for run in zip(codes, bits, record["counts"], sizes, b, strict=True)
    ]
    positions = [start + own for start, (own, _) in zip(starts, found, strict=True)]
    return np.concatenate(positions), np.concatenate([signs for _, signs in found])


def _record(text: str, file: Path) -> TernaryRecord:
    """Return the metadata of a file, checked."""
    try:
        raw = parse_json(text)
        # before the shape: a later format may have other fields
        if isinstance(raw, dict) and raw.get("format") not in FORMATS:
            raise ValueError(
                f"it is of format {shown(raw.get('format'))}, and this version of petl reads "
                f"formats {TOGETHER} and {APART}"
            )
        record: TernaryRecord = with_shape(raw, TernaryRecord)
        _check(record)
    except ValueError as error:
        raise InputError(f"{file} cannot be used: {error}") from error
    return record


def _check(record: TernaryRecord) -> None:
    """Raise ValueError if values of the metadata are out of range or contradict each other."""
    rows = record
    names = record["names"]
    # positions refer to tensors laid end to end in this order
    if names != sorted(set(names)):
        raise ValueError(f"its names are not in order, or one is there twice: {shown(names)}")
    for key in LISTS:
        if len(rows[key]) != len(names):
            raise ValueError(f"{key} has {len(rows[key])} entries for {len(names)} tensors")
    for name, shape, dtype, count in zip(
        names, record["shapes"], record["dtypes"], record["counts"], strict=True
    ):
        if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
            raise ValueError(f"{name} is of dtype {shown(dtype)}, which is not coded")
        # Python integers do not overflow in prod; those of numpy, later, would
        if any(not 0 <= size < LARGEST for size in shape) or not 0 <= count <= prod(shape):
            raise ValueError(f"{name} has shape {shape} and {count} kept entries")
    if sum(map(prod, record["shapes"])) >= LARGEST or min(record["scales"] + [0]) < 0:
        raise ValueError("its tensors are too large, or a scale is negative")
    bits, _ = _of_codes(record, "bits"), _of_codes(record, "b")
    if sum(record["counts"]) != record["entries"] or not all(0 <= n < LARGEST for n in bits):
        raise ValueError(f"it has {record['entries']} entries and {shown(record['bits'])} bits")


def _of_codes(record: TernaryRecord, key: str) -> list[int]:
    """Return a field with a number for each code, or raise ValueError if the format has others."""
    rows: Any = record
    value, apart = rows[key], record["format"] == APART
    if isinstance(value, list) != apart or (apart and not 0 < len(value) == len(record["names"])):
        raise ValueError(f"{key}={shown(value)} does not fit format {record['format']}")
    return value if apart else [value]


def _damaged(file: Path, reason: str) -> InputError:
    return InputError(f"{file} is damaged: {reason}")
