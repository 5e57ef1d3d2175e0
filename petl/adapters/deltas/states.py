"""What the tools for deltas share: which tensors of a state take part, and how they are checked."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from petl.errors import InputError
from petl.ops.ternary import State
from petl.system.files.tensor_file import check_finite
from petl.system.values import bounded, one_of

SCOPES = one_of("global", "tensor")  # what is trimmed together
SHARE, DROPPED = bounded(gt=0, le=1), bounded(ge=0, lt=1)  # of entries


def free_names(state: State, exclude: Iterable[str] = ()) -> list[str]:
    """Return the sorted names of floating-point tensors that no pattern of `exclude` is found in.

    Raises:
        InputError: a pattern is no regular expression.
    """
    return [name for name in names_without(state, exclude) if state[name].is_floating_point()]


def names_without(names: Iterable[str], exclude: Iterable[str]) -> list[str]:
    """Return the sorted names that no pattern of `exclude` is found in.

    Raises:
        InputError: a pattern is no regular expression.
    """
    try:
        patterns = [re.compile(pattern) for pattern in exclude]
    except re.error as error:
        raise InputError(f"exclude={list(exclude)!r}: {error}") from error
    return [name for name in sorted(names) if not any(p.search(name) for p in patterns)]


def coded_names(state: State, exclude: Iterable[str] = ()) -> list[str]:
    """Return the names of `free_names`, checked.

    Raises:
        InputError: there is none, one of them has a value that is not finite, or a pattern is no
            regular expression.
    """
    names = free_names(state, exclude)
    if not names:
        raise InputError(
            f"the state has no floating-point tensor that is not excluded, among {len(state)}"
        )
    check_finite({name: state[name] for name in names}, "the state")
    return names


def difference(state: State, name: str, reference: State | None) -> Tensor:
    """Return a tensor less its reference (None: 0), in float32 and flattened."""
    tau = state[name].detach().float().flatten()
    return tau if reference is None else tau - reference[name].float().flatten()


def check_reference(names: Iterable[str], state: State, reference: State | None) -> None:
    """Raise InputError if a reference lacks a tensor, or has it in another shape."""
    if reference is None:
        return
    for name in names:
        if name not in reference:
            raise InputError(f"the reference has no tensor {name}")
        if reference[name].shape != state[name].shape:
            raise InputError(
                f"{name} has shape {list(state[name].shape)}, and its reference "
                f"{list(reference[name].shape)}"
            )


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` largest entries, the first ones among equals; 0 is never chosen.

    Args:
        magnitudes: [d], from 0.
    """
    # kthvalue counts from the smallest, from 1
    limit = magnitudes.kthvalue(len(magnitudes) - count + 1).values
    mask = magnitudes > limit
    if limit > 0:
        equal = (magnitudes == limit).nonzero().squeeze(1)
        mask[equal[: count - int(mask.sum())]] = True
    return mask


def largest_each(magnitudes: Tensor, counts: Iterable[int]) -> dict[int, Tensor]:
    """Return the masks of `largest` for several counts; only one selection sees all entries.

    Args:
        magnitudes: [d], from 0.
    """
    found: dict[int, Tensor] = {}
    rest = magnitudes  # of the entries that the next larger count keeps
    places = None  # of these among all, ascending; None: all of them
    for count in sorted({*counts}, reverse=True):
        # fewer entries than `count` if the larger selection left out zeros
        mask = largest(rest, min(count, len(rest))) if len(rest) else rest > 0
        places = mask.nonzero().squeeze(1) if places is None else places[mask]
        rest = rest[mask]
        found[count] = torch.zeros_like(magnitudes, dtype=torch.bool)
        found[count][places] = True
    return found


def count_of(density: float, entries: int) -> int:
    """Return the number of entries that are kept: `density` of them, rounded, at least one."""
    # not `round`, which rounds halves to even
    return min(entries, max(1, int(density * entries + 0.5)))


def deviation(parts: Iterable[Tensor]) -> float:
    """Return the unbiased standard deviation of all entries, summed in float64.

    Of a single entry, its magnitude, so that its size is not lost.
    """
    tensors = list(parts)
    count = sum(t.numel() for t in tensors)
    mean = sum(float(t.sum(dtype=torch.float64)) for t in tensors) / count
    if count == 1:
        return abs(mean)
    # two passes: a difference of large sums would lose digits
    squares = sum(float((t.double() - mean).square_().sum()) for t in tensors)
    return (squares / (count - 1)) ** 0.5
