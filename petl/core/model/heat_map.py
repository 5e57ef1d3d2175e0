"""Heat maps: what a method did, as numbers by module and layer, and pictures of them."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from petl.core.experts.linears import stack_of
from petl.core.model.places import place
from petl.core.types import Arguments
from petl.system.files.disk import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT_MAPS = "heat_maps.json"  # in the folder of a run
# suffix and size of the units of large numbers, and from which number on they are used
UNITS = (("G", 1e9, 999.5e6), ("M", 1e6, 999.5e3), ("k", 1e3, 1e4))
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
    """Return the values by name inside the block and index of the block; of experts, their mean."""
    of_stacks: dict[str, list[float]] = {}
    for key, value in values.items():
        of_stacks.setdefault(stack_of(key), []).append(value)
    values = {key: sum(own) / len(own) for key, own in of_stacks.items()}
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


def without_common_parts(paths: Iterable[str]) -> list[str]:
    """Return dotted paths without the first parts that all of them have; the last part stays."""
    parts = [path.split(".") for path in paths]
    # zip ends with the shortest
    parents = zip(*(each[:-1] for each in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len({*column}) == 1, parents))
    return [".".join(each[shared:]) for each in parts]


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


# width of a cell, of all cells at most, height of a row, width of a letter, in inches; with names
# of usual length a plot fits a page in landscape
CELL, ALL_CELLS, ROW, LETTER = 0.45, 7.0, 0.3, 0.075
MIN_POINTS, MAX_POINTS = 5.0, 8.0  # font size of numbers; smaller ones are not written


def draw(heat_map: HeatMap, path: Path) -> None:
    """Draw a heat map as a PNG file."""
    # its import takes a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, columns, top = heat_map.rows, heat_map.columns, heat_map.top
    cell = min(CELL, ALL_CELLS / len(columns))
    width = LETTER * max(map(len, rows)) + cell * len(columns) + 1.4  # 1.4: color bar and margins
    size = max(width, 1.15 * LETTER * len(heat_map.title)), max(2.5, ROW * len(rows) + 1.3)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    figure.suptitle(heat_map.title, fontsize=10)
    axes = figure.subplots()
    axes.set_facecolor("0.85")  # of cells without a value
    options: Arguments = {"edgecolors": "white", "linewidth": 0.5}
    grid = [[float("nan") if v is None else float(v) for v in row] for row in heat_map.cells]
    colors = axes.pcolormesh(grid, cmap="Blues", vmin=0, vmax=top or 1, **options)
    axes.invert_yaxis()
    _name_cells(axes, heat_map, cell)
    whole = all(isinstance(v, int) for row in heat_map.cells for v in row)
    scale = figure.colorbar(colors, ticks=MaxNLocator(nbins=6, integer=whole))
    scale.set_label(heat_map.unit, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    texts = [[cell_text(value) for value in row] for row in heat_map.cells]
    # a digit is about 0.6 of the font size wide; the longest number takes 0.8 of a cell
    longest = max([1, *(len(text) for row in texts for text in row)])  # texts may all be empty
    points = min(MAX_POINTS, 0.8 * 72 * cell / (0.6 * longest))
    for y, row in enumerate(texts if points >= MIN_POINTS else ()):
        for x, text in enumerate(row):
            color = "white" if grid[y][x] > 0.6 * top else "black"
            axes.text(
                x + 0.5, y + 0.5, text, ha="center", va="center", color=color, fontsize=points
            )
    save_figure(figure, path)


def cell_text(value: float | None) -> str:
    """Return a number in few characters, such as 12.6k from 10,000 on; "" for None."""
    if value is None:
        return ""
    for suffix, unit, least in UNITS:
        if value >= least:
            return f"{value / unit:.3g}{suffix}"
    if isinstance(value, int):
        return str(value)
    if 0 < value < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")  # shorter than 0.00029
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure of matplotlib as a PNG file, atomically."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(path, image.getvalue())


def _name_cells(axes: "Axes", heat_map: HeatMap, cell: float) -> None:
    """Label rows and columns; columns are `cell` inches apart, and labels at least 0.2."""
    rows, columns = heat_map.rows, heat_map.columns
    step = next((n for n in (1, 2, 5) if n * cell >= 0.2), 10)
    shown = [i for i, c in enumerate(columns) if i % step == 0 and c != ELSEWHERE]
    axes.set_xticks([i + 0.5 for i in shown], [columns[i] for i in shown])
    if columns[-1] == ELSEWHERE:
        axes.text(len(columns) - 0.5, -0.1, ELSEWHERE, ha="center", va="bottom", fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0, labelsize=9)
    has_gaps = any(value is None for row in heat_map.cells for value in row)
    gaps = " (grey: none)" if has_gaps else ""
    axes.set_xlabel(f"{heat_map.column_label}{gaps}", fontsize=9)
    axes.set_ylabel(heat_map.row_label, fontsize=9)
