"""Safetensors files of strangers: the header without the tensors, and checks of both."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from petl.errors import InputError, did_you_mean, first_line

# safetensors orders tensors by dtype as here, then by name
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Shapes = dict[str, tuple[torch.dtype, torch.Size]]


def read_shapes(file: Path) -> Shapes:
    """Read dtype and shape of the tensors in a safetensors file, by name; no tensor is read.

    Raises:
        InputError: the file is no safetensors file, its size is not that of its header, or a tensor
            is of a dtype that no adapter has.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            # a slice reads its data only when it is indexed
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}") from error
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise InputError(
                f"{file}: {name} is of dtype {dtype}; adapters have {', '.join(DTYPES)}"
            )
    return {name: (DTYPES[dtype], torch.Size(shape)) for name, (dtype, shape) in found.items()}


def read_file(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata of a safetensors file, and its tensors by name.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return opened.metadata() or {}, tensors
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}") from error


def check_shapes(
    found: Shapes, expected: Shapes, optional: Shapes, free_dims: Mapping[str, int], what: str
) -> None:
    """Raise InputError unless a file has exactly the tensors that model and config require.

    Args:
        found: names, dtypes and shapes of the tensors in the file.
        expected: those that it must have.
        optional: those that it may have in addition.
        free_dims: for the last part of a name, the dimension that may have any size.
        what: the file, for the message.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - optional.keys())
    if missing or unexpected:
        nearest = ""
        # with missing ones too, a similar name would be chance: the config is another one
        if unexpected and not missing:
            nearest = did_you_mean(unexpected[0], expected, limit=0)
        raise InputError(
            f"{what} does not fit this model and config: tensors "
            f"{' and '.join(_counted(missing, unexpected))}; it was truncated, or saved from "
            f"another model or config{nearest}"
        )
    known = {**optional, **expected}
    wrong = {
        name: reason
        for name, (dtype, shape) in found.items()
        if (reason := difference(dtype, shape, *known[name], free_dims.get(_last(name))))
    }
    if wrong:
        name, reason = next(iter(wrong.items()))
        more = f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""
        raise InputError(f"{what} does not fit the model: {name} {reason}{more}")


def _counted(missing: list[str], unexpected: list[str]) -> list[str]:
    both = (missing, "missing"), (unexpected, "unexpected")
    return [f"{len(names)} {word} (such as {names[0]})" for names, word in both if names]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def difference(
    dtype: torch.dtype,
    shape: torch.Size,
    own_dtype: torch.dtype,
    own_shape: torch.Size,
    free_dim: int | None = None,
) -> str:
    """Return how a tensor in a file differs from the model's in shape or kind of dtype; or "".

    Floating-point dtypes may differ in precision, integers in size; one is never cast to the other.
    """
    if kind(dtype) != kind(own_dtype):
        article = "an" if kind(own_dtype) == "integer" else "a"
        return f"is {DTYPE_NAMES[dtype]}, not of {article} {kind(own_dtype)} type"
    sizes = [
        # all dimensions but the free one
        list(s[:free_dim]) + list(s[free_dim + 1 :]) if free_dim is not None else list(s)
        for s in (shape, own_shape)
    ]
    # both: without the free dimension, shapes of other lengths could agree
    if len(shape) != len(own_shape) or sizes[0] != sizes[1]:
        return f"has shape {list(shape)}, not {list(own_shape)}"
    return ""


def kind(dtype: torch.dtype) -> str:
    """Return the kind of a dtype: within one, values may be cast."""
    if dtype in (torch.bool, torch.uint8):  # uint8: packed codes
        return DTYPE_NAMES[dtype]
    return "floating-point" if dtype.is_floating_point else "integer"


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise InputError if a tensor has an entry that is infinite or not a number.

    Args:
        tensors: those of a file, by name.
        what: the file, for the message.
    """
    broken = [
        name
        for name, tensor in tensors.items()
        # meta tensors have no values
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all())
    ]
    if broken:
        count = int((~tensors[broken[0]].isfinite()).sum())
        raise InputError(
            f"{what} has values that are not finite: {count} of {broken[0]} ({len(broken)} of "
            f"{len(tensors)} tensors have some); the adapter diverged in training, or the file is "
            "damaged"
        )


def check_index(name: str, index: Tensor, size: int, *, unique: bool = False) -> None:
    """Raise InputError unless a table of indices is in [0, size), and without repeats if `unique`.

    Args:
        name: of the table, for the message.
        index: [K], integers.
        size: number of entries that the table points into.
    """
    if index.is_meta or not index.numel():
        return
    low, high = (int(value) for value in index.aminmax())
    # torch takes a negative index as from the end, silently
    if low < 0 or high >= size:
        raise InputError(f"{name} has index {low if low < 0 else high}, outside of [0, {size})")
    if unique and len(index.unique()) < index.numel():
        raise InputError(f"{name} has {index.numel() - len(index.unique())} indices twice")
