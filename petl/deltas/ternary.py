"""ComPEFT: the signs of the largest entries of what was learned, with one magnitude.

Source: Yadav, Choshen, Raffel, Bansal, "ComPEFT: Compression for Communicating Parameter Efficient
Updates via Sparsification and Quantization", arXiv 2311.13171. Unlike its reference code, which
keeps one entry more and all that equal the threshold, exactly the requested number is kept, and
sizes are those of files, by a Rice code.

Symbols: tau = state - reference, flattened in float32 and laid end to end in the order of the
names, d its length; n = density d entries of largest |tau| are kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petl.deltas import rice
from petl.deltas.states import (
    State,
    check_reference,
    coded_names,
    count_of,
    deviation,
    difference,
    fraction,
    largest,
    one_of,
    restored,
)
from petl.errors import InputError, shown

SCOPES = ("global", "tensor")


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
    """

    shapes: dict[str, tuple[torch.dtype, torch.Size]]
    kept: dict[str, int]
    sigma: dict[str, float]
    scale: dict[str, float]
    positions: rice.Positions
    signs: rice.Signs
    others: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Number of entries coded."""
        return sum(shape.numel() for _, shape in self.shapes.values())

    @cached_property
    def code(self) -> tuple[rice.Bits, int, int]:
        """The code of positions and signs: bytes, number of bits, parameter b."""
        b = rice.parameter(len(self.positions), self.numel)
        return *rice.encode(self.positions, self.signs, b), b

    @property
    def bits(self) -> float:
        """Bits of the code for each entry coded."""
        return self.code[1] / self.numel

    @cached_property
    def places(self) -> dict[str, tuple[int, int, slice]]:
        """By name: where a tensor begins and ends in tau, and which kept entries are its own."""
        ends = np.cumsum([0, *(shape.numel() for _, shape in self.shapes.values())])
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
        mine, theirs = ({n: s for n, (_, s) in x.shapes.items()} for x in (self, other))
        if mine != theirs:
            name = next(iter(mine.items() ^ theirs.items()))[0]
            raise InputError(f"the two have other tensors: {name} is not in both, of one shape")
        _, one, two = np.intersect1d(
            self.positions, other.positions, assume_unique=True, return_indices=True
        )
        agree = np.where(self.signs[one] == other.signs[two], 1.0, -1.0)
        scales = [np.array([x.scale[name] for name in mine]) for x in (self, other)]
        ends = np.cumsum([shape.numel() for shape in mine.values()])
        tensor = np.searchsorted(ends, self.positions[one], side="right")
        return float((agree * scales[0][tensor] * scales[1][tensor]).sum())

    def save(self, file: str | Path) -> None:
        """Write the file: the code, the tensors not coded, and the rest as metadata."""
        from petl.deltas.ternary_file import write

        write(self, Path(file))

    @classmethod
    def load(cls, file: str | Path) -> "Ternary":
        """Read a file of `save`.

        Raises:
            InputError: the file is damaged, or not of this format.
        """
        from petl.deltas.ternary_file import read

        return read(Path(file))


def compress(
    state: State,
    *,
    density: float = 0.05,
    alpha: float | str = 1.0,
    scope: str = "global",
    exclude: Iterable[str] = (),
    reference: State | None = None,
) -> Ternary:
    """Keep the signs of the largest entries of a state, with one magnitude.

    Args:
        state: tensors by name; those of floating-point type are coded, the others kept.
        density: fraction of the entries kept, in (0, 1].
        alpha: the magnitude in standard deviations of tau, above 0; or "fit": the mean of the kept
            magnitudes, the best in least squares.
        scope: the largest entries, and the deviation, of all tensors together ("global") or of each
            ("tensor").
        exclude: regular expressions; tensors in whose name one is found are not coded.
        reference: subtracted from the state; None: 0.

    Raises:
        InputError: an argument is out of range, a value is not finite, or no tensor is coded.
    """
    density = fraction("density", density)
    one_of("scope", scope, SCOPES)
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha != "fit" and not (is_number and 0 < float(alpha) < float("inf")):
        raise InputError(f'alpha={shown(alpha)} is neither a number above 0 nor "fit"')
    names = coded_names(state, exclude)
    check_reference(names, state, reference)
    parts = {name: difference(state, name, reference) for name in names if state[name].numel()}
    groups = [list(parts)] if scope == "global" else [[name] for name in parts]
    chosen: dict[str, Tensor] = {}
    sigma, scale = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for group in groups:
        masks = _kept([parts[name] for name in group], density)
        chosen.update(zip(group, masks, strict=True))
        spread = deviation(parts[name] for name in group)
        fitted = _mean_magnitude([parts[name][chosen[name]] for name in group])
        for name in group:
            sigma[name] = spread
            scale[name] = fitted if alpha == "fit" else float(alpha) * spread
    signs = [parts[name][mask] > 0 for name, mask in chosen.items()]
    return Ternary(
        {name: (state[name].dtype, state[name].shape) for name in names},
        {name: int(chosen[name].sum()) if name in chosen else 0 for name in names},
        sigma,
        scale,
        torch.cat(list(chosen.values())).nonzero().squeeze(1).numpy(),
        torch.cat(signs).numpy(),
        {name: tensor for name, tensor in state.items() if name not in names},
        {"density": density, "alpha": alpha, "scope": scope},
    )


def _kept(parts: list[Tensor], density: float) -> list[Tensor]:
    """Return masks of the largest entries of tensors laid end to end."""
    magnitudes = torch.cat([part.abs() for part in parts])
    mask = largest(magnitudes, count_of(density, len(magnitudes)))
    return list(mask.split([len(part) for part in parts]))


def _mean_magnitude(parts: list[Tensor]) -> float:
    """Return the mean of the absolute values, 0 without any."""
    count = sum(len(part) for part in parts)
    total = sum(float(part.abs().sum(dtype=torch.float64)) for part in parts)
    return total / count if count else 0.0
