"""Pictures of a value by layer and module, for the folder of a run."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from petl.core.targets import place

logger = logging.getLogger(__name__)

ELSEWHERE = "outside"  # the column of modules that stand in no module list


def draw_by_layer(
    model: nn.Module, values: Mapping[str, int], path: Path, *, title: str
) -> list[Path]:
    """Draw whole numbers as a map: a column for each block of the model, a row for each module.

    Without matplotlib, which is optional, a warning says how to get it and nothing is drawn.

    Args:
        model: the base model.
        values: by module path.
        path: the PNG file to write.
        title: above the map.

    Returns:
        The files written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s is not drawn: pip install matplotlib", path.name)
        return []
    cells = by_layer(model, values)
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({column for _, column in cells}, key=lambda c: (c == ELSEWHERE, c))
    grid = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    figure = Figure(figsize=(2.5 + 0.45 * len(columns), 1.2 + 0.35 * len(rows)), dpi=150)
    axes = figure.subplots()
    top = max(cells.values(), default=1)
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=10)
    for (row, column), value in cells.items():
        color = "white" if value > 0.6 * top else "black"
        spot = columns.index(column), rows.index(row)
        axes.text(*spot, str(value), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, bbox_inches="tight")
    return [path]


def by_layer(model: nn.Module, values: Mapping[str, int]) -> dict[tuple[str, int | str], int]:
    """The values by name inside the block and index of the block."""
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
