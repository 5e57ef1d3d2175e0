"""The file of a compressed state: a safetensors file that may come from a stranger.

Tensors: `petl_ternary_code` (uint8), and those that are not coded under their own names. Metadata:
`petl_ternary`, the JSON of `Record`.
"""

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import save_file

from petl.deltas import rice
from petl.deltas.ternary import Ternary
from petl.errors import InputError, shown
from petl.files.read import parse_json, with_shape
from petl.files.tensor_file import DTYPE_NAMES, DTYPES, check_finite, read_file

FILE = "ternary.safetensors"
CODE, METADATA, FORMAT = "petl_ternary_code", "petl_ternary", 1
LARGEST = 2**40  # entries, more than any adapter has: their sums do not overflow


class Record(TypedDict):
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
    b: int
    bits: int
    entries: int
    sha256: str


LISTS = ("shapes", "dtypes", "scales", "sigmas", "counts")


def write(ternary: Ternary, file: Path) -> None:
    """Write a compressed state."""
    code, bits, b = ternary.code
    record = {
        "format": FORMAT,
        "names": list(ternary.shapes),
        "shapes": [list(shape) for _, shape in ternary.shapes.values()],
        "dtypes": [DTYPE_NAMES[dtype] for dtype, _ in ternary.shapes.values()],
        "scales": list(ternary.scale.values()),
        "sigmas": list(ternary.sigma.values()),
        "counts": list(ternary.kept.values()),
        **ternary.settings,
        "b": b,
        "bits": bits,
        "entries": len(ternary.positions),
        "sha256": hashlib.sha256(code.tobytes()).hexdigest(),
    }
    others = {name: tensor.contiguous() for name, tensor in ternary.others.items()}
    tensors = {CODE: torch.from_numpy(code), **others}
    save_file(tensors, file, {"format": "pt", METADATA: json.dumps(record)})


def read(file: Path) -> Ternary:
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
    if hashlib.sha256(stored.tobytes()).hexdigest() != record["sha256"]:
        raise _damaged(file, "its code has another sha256 than its metadata say")
    twice = sorted({*record["names"]} & tensors.keys())
    if twice:
        raise _damaged(file, f"{twice[0]} is there twice")
    check_finite(tensors, str(file))
    names, entries = record["names"], sum(map(prod, record["shapes"]))
    positions, signs = rice.decode(
        stored, record["bits"], record["entries"], entries, record["b"], file
    )
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
    )
    for name, (_, _, own) in found.places.items():
        if own.stop - own.start != found.kept[name]:
            raise _damaged(file, f"{name} has other entries than its metadata say")
    return found


def _record(text: str, file: Path) -> Record:
    """Return the metadata of a file, checked."""
    try:
        raw = parse_json(text)
        if isinstance(raw, dict) and raw.get("format") != FORMAT:
            raise ValueError(
                f"it is of format {shown(raw.get('format'))}, and this version of petl reads "
                f"format {FORMAT}"
            )
        record: Record = with_shape(raw, Record)
        _check(record)
    except ValueError as error:
        raise InputError(f"{file} cannot be used: {error}") from error
    return record


def _check(record: Record) -> None:
    """Raise ValueError if values of the metadata are out of range or contradict each other."""
    rows: Any = record
    names = record["names"]
    if names != sorted(set(names)):
        raise ValueError("its names are not in order, or one is there twice")
    for key in LISTS:
        if len(rows[key]) != len(names):
            raise ValueError(f"{key} has {len(rows[key])} entries for {len(names)} tensors")
    for name, shape, dtype, count in zip(
        names, record["shapes"], record["dtypes"], record["counts"], strict=True
    ):
        if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
            raise ValueError(f"{name} is of dtype {shown(dtype)}, which is not coded")
        if any(not 0 <= size < LARGEST for size in shape) or not 0 <= count <= prod(shape):
            raise ValueError(f"{name} has shape {shape} and {count} kept entries")
    if sum(map(prod, record["shapes"])) >= LARGEST or min(record["scales"] + [0]) < 0:
        raise ValueError("its tensors are too large, or a scale is negative")
    if sum(record["counts"]) != record["entries"] or not 0 <= record["bits"] < LARGEST:
        raise ValueError(f"it has {record['entries']} entries and {record['bits']} bits")


def _damaged(file: Path, reason: str) -> InputError:
    return InputError(f"{file} is damaged: {reason}")
