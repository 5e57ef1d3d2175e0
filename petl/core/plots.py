"""Pictures of heat maps, for the folder of a run and for trackers."""

import io
from pathlib import Path
from typing import Any

from petl.core.model.heat_map import ELSEWHERE, HeatMap
from petl.files.disk import write_atomic

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
    options: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.5}
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
    longest = max(len(text) for row in texts for text in row)
    points = min(MAX_POINTS, 0.8 * 72 * cell / (0.6 * longest))
    for y, row in enumerate(texts if points >= MIN_POINTS else ()):
        for x, text in enumerate(row):
            color = "white" if grid[y][x] > 0.6 * top else "black"
            axes.text(
                x + 0.5, y + 0.5, text, ha="center", va="center", color=color, fontsize=points
            )
    save_figure(figure, path)


def cell_text(value: Any) -> str:
    """Return a number in at most four characters if it is below 10,000; "" for None."""
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as a PNG file, atomically."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(path, image.getvalue())


def _name_cells(axes: Any, heat_map: HeatMap, cell: float) -> None:
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
