"""Plots of a value by layer and module, for the folder of a run."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from petl.core.model.targets import place
from petl.files.disk import write_atomic

ELSEWHERE = "outside"  # the column of modules outside any nn.ModuleList
# width of a cell, of all cells at most, height of a row, width of a letter, in inches; with names
# of usual length a plot fits a page in landscape
CELL, ALL_CELLS, ROW, LETTER = 0.45, 7.0, 0.3, 0.075
MIN_POINTS, MAX_POINTS = 5.0, 8.0  # font size of numbers; smaller ones are not written


def draw_by_layer(
    model: nn.Module, values: Mapping[str, int], path: Path, *, title: str, unit: str
) -> list[Path]:
    """Draw integers as a heat map: a column per block of the model, a row per module of a block.

    Args:
        model: the base model.
        values: by module path.
        path: the PNG file to write.
        title: above the map.
        unit: what the numbers count, the label of the color bar.

    Returns:
        The files written.
    """
    # its import takes a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    cells = by_layer(model, values)
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({column for _, column in cells}, key=lambda c: (c == ELSEWHERE, c))
    grid = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    top, cell = max(cells.values(), default=1), min(CELL, ALL_CELLS / len(columns))
    width = LETTER * max(map(len, rows)) + cell * len(columns) + 1.4  # 1.4: color bar and margins
    size = max(width, 1.15 * LETTER * len(title)), max(2.5, ROW * len(rows) + 1.3)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots()
    axes.set_facecolor("0.85")  # of cells without a value
    options: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.5}
    colors = axes.pcolormesh(grid, cmap="Blues", vmin=0, vmax=top, **options)
    axes.invert_yaxis()
    _name_cells(axes, rows, columns, cell)
    if len(cells) < len(rows) * len(columns):
        axes.set_xlabel(f"{axes.get_xlabel()} (grey: no adapter there)", fontsize=9)
    scale = figure.colorbar(colors, ticks=MaxNLocator(nbins=6, integer=True))
    scale.set_label(unit, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    # a digit is about 0.6 of the font size wide; the longest number takes 0.8 of a cell
    points = min(MAX_POINTS, 0.8 * 72 * cell / (0.6 * len(str(top))))
    for (row, column), value in cells.items() if points >= MIN_POINTS else ():
        spot = columns.index(column) + 0.5, rows.index(row) + 0.5
        color = "white" if value > 0.6 * top else "black"
        axes.text(*spot, str(value), ha="center", va="center", color=color, fontsize=points)
    save_figure(figure, path)
    return [path]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as a PNG file, atomically."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(path, image.getvalue())


def _name_cells(axes: Any, rows: list[str], columns: list[int | str], cell: float) -> None:
    """Label rows and columns; columns are `cell` inches apart, and labels at least 0.2."""
    step = next((n for n in (1, 2, 5) if n * cell >= 0.2), 10)
    shown = [i for i, c in enumerate(columns) if i % step == 0 and c != ELSEWHERE]
    axes.set_xticks([i + 0.5 for i in shown], [str(columns[i]) for i in shown])
    if columns[-1] == ELSEWHERE:
        axes.text(len(columns) - 0.5, -0.1, ELSEWHERE, ha="center", va="bottom", fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0, labelsize=9)
    axes.set_xlabel("layer of the model, from 0", fontsize=9)
    axes.set_ylabel("linear module of a layer", fontsize=9)


def by_layer(model: nn.Module, values: Mapping[str, int]) -> dict[tuple[str, int | str], int]:
    """Return the values by name inside the block and index of the block."""
    cells: dict[tuple[str, int | str], int] = {}
    stacks = {where.stack for key in values if (where := place(model, key)) is not None}
    for key, value in values.items():
        where = place(model, key)
        if where is None:
            cells[key, ELSEWHERE] = value
        else:
            prefix = f"{where.stack}: " if len(stacks) > 1 else ""
            cells[prefix + where.name, where.index] = value
    return cells
