"""Charts of a comparison."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from petl.imports.extras import install_hint
from petl.reports.svg import number

logger = logging.getLogger(__name__)

MARKERS = "osD^vP*Xph<>8"
LEGEND_WIDTH = 36  # characters; a longer name goes on in the next line


class Point(NamedTuple):
    """An entry's score, with its standard deviation, and what it costs."""

    name: str
    cost: float
    score: float
    spread: float


def draw_costs(
    panels: Mapping[str, Sequence[Point]], path: Path, *, score: str, higher_is_better: bool
) -> list[Path]:
    """Draw a score against each of its costs, with the line of those that no other one beats.

    Without matplotlib, which is optional, a warning says how to get it and nothing is drawn.

    Args:
        panels: the points by what they cost; the same names in each.
        path: the PNG file to write.
        score: what the score is called, with its unit.

    Returns:
        The files written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s is not drawn: %s", path.name, install_hint("plots"))
        return []
    names = list(dict.fromkeys(point.name for points in panels.values() for point in points))
    legend = {name: fill(name, LEGEND_WIDTH) for name in names}
    lines = sum(text.count("\n") + 1 for text in legend.values())
    height = max(8, 0.27 * lines + 0.5)  # inches, for the legend
    figure = Figure(figsize=(12, height), dpi=130, layout="constrained")
    rows = -(-len(panels) // 2)
    for i, (cost, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, 2, i)
        best = front(points, higher_is_better=higher_is_better)
        axes.step(
            [point.cost for point in best],
            [point.score for point in best],
            where="post",
            color="0.6",
            linestyle="--",
            zorder=1,
        )
        for point in points:
            axes.errorbar(
                point.cost,
                point.score,
                yerr=point.spread or None,
                label=legend[point.name],
                linestyle="none",
                marker=MARKERS[names.index(point.name) % len(MARKERS)],
                color=colormaps["tab10"](names.index(point.name) % 10),
                capsize=3,
                markersize=7,
            )
        axes.set_xlabel(cost)
        axes.set_ylabel(score)
        if max(p.cost for p in points) > 8 * min(p.cost for p in points):
            axes.set_xscale("log")
            few_plain_ticks(axes.xaxis, max(p.cost for p in points) / min(p.cost for p in points))
        else:
            axes.set_xlim(0, 1.1 * max(p.cost for p in points))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="mean ± s.d. of seeds")
    figure.savefig(path)
    return [path]


def few_plain_ticks(axis: Any, ratio: float) -> None:
    """Have a logarithmic axis whose ends have this ratio name round numbers, none over another."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """The points that no other one is both cheaper and better than, by rising cost."""
    sign = 1 if higher_is_better else -1
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -sign * p.score)):
        if not kept or sign * point.score > sign * kept[-1].score:
            kept.append(point)
    return kept
