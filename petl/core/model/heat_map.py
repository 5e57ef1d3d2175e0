"""Heat maps: what a method did, as numbers by module and layer, for the folder of a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from petl.core.model.targets import place

HEAT_MAPS = "heat_maps.json"  # in the folder of a run
ELSEWHERE = "outside"  # the column of modules outside any list of layers


@dataclass(frozen=True)
class HeatMap:
    """Numbers of at least 0 in rows and columns.

    Attributes:
        name: of the picture's file, without its suffix.
        title: one line.
        unit: what the numbers are.
        cells: one list per row; None where there is nothing.
        meaning: how to read the numbers, in a sentence or two, or "".
        row_label: what the rows are.
        column_label: what the columns are.
    """

    name: str
    title: str
    unit: str
    rows: list[str]
    columns: list[str]
    cells: list[list[float | None]]
    meaning: str = ""
    row_label: str = "module of a layer"
    column_label: str = "layer of the model, from 0"

    @property
    def top(self) -> float:
        """The largest number."""
        return max((v for row in self.cells for v in row if v is not None), default=1.0)

    def share(self, value: float) -> float:
        """Return a number relative to the largest, for its color: from 0 to 1, in 3 digits."""
        return round(max(value, 0) / self.top, 3) if self.top > 0 else 0.0


def finite(value: float | None) -> float | None:
    """Return a number, or None for one that is not finite: a run may have diverged."""
    return value if value is not None and math.isfinite(value) else None


def of_layers(
    model: nn.Module,
    values: Mapping[str, float],
    name: str,
    title: str,
    unit: str,
    meaning: str = "",
) -> list[HeatMap]:
    """Return a map of values by module path: a column per layer, a row per module of a layer.

    Empty without values.

    Args:
        model: the base model.
        values: by module path.
        name: see `HeatMap`, as for the other arguments.
    """
    found = by_layer(model, values)
    # dict.fromkeys: without repeats, in the order of the model
    rows = list(dict.fromkeys(row for row, _ in found))
    # the word last: it is never compared with an index, since its first key differs
    columns = sorted({column for _, column in found}, key=lambda c: (c == ELSEWHERE, c))
    cells = [[finite(found.get((row, column))) for column in columns] for row in rows]
    heat_map = HeatMap(name, title, unit, rows, list(map(str, columns)), cells, meaning)
    return [heat_map] if found else []


def by_layer(model: nn.Module, values: Mapping[str, float]) -> dict[tuple[str, int | str], float]:
    """Return the values by name inside the block and index of the block."""
    places = {key: place(model, key) for key in values}
    stacks = {where.stack for where in places.values() if where is not None}
    cells: dict[tuple[str, int | str], float] = {}
    for key, where in places.items():
        if where is None:
            cells[key, ELSEWHERE] = values[key]
        else:
            prefix = f"{where.stack}: " if len(stacks) > 1 else ""
            cells[prefix + where.name, where.index] = values[key]
    return cells


def role_of(model: nn.Module, key: str) -> str:
    """Return the path of a module inside its layer, which all layers have."""
    where = place(model, key)
    return key if where is None else where.name


def layers_of(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return the layer of each module: its index, with the list if there are several lists."""
    places = {key: place(model, key) for key in keys}
    several = len({where.stack for where in places.values() if where is not None}) > 1
    return {
        # a string times False is ""
        key: ELSEWHERE if where is None else f"{where.stack} " * several + str(where.index)
        for key, where in places.items()
    }


def means(groups: Iterable[tuple[str, Sequence[float]]]) -> dict[str, list[float | None]]:
    """Return by name the elementwise means of its sequences, which are equally long."""
    of_name: dict[str, list[Sequence[float]]] = {}
    for name, numbers in groups:
        of_name.setdefault(name, []).append(numbers)
    return {
        # None for a mean with an infinite member: JSON has no infinity
        name: [finite(sum(column) / len(column)) for column in zip(*several, strict=True)]
        for name, several in of_name.items()
    }
