"""Charts of bars side by side, for the folder of a run, its page and trackers."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from petl.core.model.heat_map import save_figure

if TYPE_CHECKING:  # its import takes a second
    from matplotlib.axes import Axes

MOST_NAMES = 16  # of bars below an axis
BAR_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # as on the page of a run


class Bar(NamedTuple):
    """A bar of a chart: bars of one group have one color; `text` describes it."""

    group: str
    name: str
    value: float
    text: str = ""


class Bars(NamedTuple):
    """A chart of bars side by side, in their order.

    Attributes:
        title: one line.
        x, y: labels of the axes.
        bars: at least one.
        line: name and height of a horizontal line, or None.
    """

    title: str
    x: str
    y: str
    bars: Sequence[Bar]
    line: tuple[str, float] | None = None


def add_bars(axes: "Axes", chart: Bars, colors: Sequence[str]) -> bool:
    """Draw the bars of a chart on axes of matplotlib; return True if it needs a legend."""
    bars = chart.bars
    groups = list(dict.fromkeys(bar.group for bar in bars))
    for group, color in zip(groups, cycle(colors)):
        own = [i for i, bar in enumerate(bars) if bar.group == group]
        heights = [bars[i].value for i in own]
        axes.bar(own, heights, width=0.8, color=color, label=group if len(groups) > 1 else None)
    if chart.line is not None:
        name, height = chart.line
        axes.axhline(height, color="0.5", linestyle="--", linewidth=1, label=name)
    step = -(-len(bars) // MOST_NAMES)
    shown = range(0, len(bars), step)
    axes.set_xticks(list(shown), [bars[i].name for i in shown])
    axes.set_xlim(-0.6, len(bars) - 0.4)
    values = [bar.value for bar in bars]
    axes.set_ylim(
        min(0, 1.05 * min(values)), max(0, 1.05 * max(values)) or (1 if min(values) >= 0 else 0)
    )
    axes.grid(visible=False, axis="x")
    return len(groups) > 1 or chart.line is not None


def draw_bars(charts: Sequence[Bars], path: Path) -> None:
    """Draw charts of bars below each other as a PNG file."""
    # its import takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 2.8 * len(charts)), dpi=200, layout="constrained")
    places = figure.subplots(len(charts), squeeze=False)[:, 0]
    for axes, chart in zip(places, charts, strict=True):
        axes.set_title(chart.title, fontsize=10)
        axes.set_xlabel(chart.x, fontsize=9)
        axes.set_ylabel(chart.y, fontsize=9)
        if add_bars(axes, chart, BAR_COLORS):
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axes.tick_params(labelsize=8)
    save_figure(figure, path)
