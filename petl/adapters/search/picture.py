"""The picture of a search: bytes against fitness, of even settings and of what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petl.core.model.heat_map import save_figure

Point = tuple[int, float]  # bytes and fitness
EVEN, FOUND = "0.45", "#1f5fa8"


@dataclass(frozen=True)
class Pareto:
    """What the picture shows.

    Attributes:
        title: of the picture.
        measure: what the fitness is, with its unit.
        curve: all units at one level, by level.
        labels: of these points, the setting.
        even: the even state within the budget.
        path: the best state of each generation; empty without a search.
    """

    title: str
    measure: str
    curve: Sequence[Point]
    labels: Sequence[str]
    even: Point
    path: Sequence[Point]


def draw(pareto: Pareto, path: Path) -> None:
    """Draw a search as a PNG file."""
    # its import takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.set_title(pareto.title, fontsize=10)
    sizes, values = scaled(pareto.curve)
    axes.plot(sizes, values, "o-", color=EVEN, markersize=4, label="all units at one level")
    for size, value, label in zip(sizes, values, pareto.labels, strict=True):
        axes.annotate(
            label, (size, value), (0, 6), textcoords="offset points", fontsize=7, ha="center"
        )
    axes.plot(*scaled([pareto.even]), "s", color=EVEN, markersize=7, label="even, at the budget")
    if pareto.path:
        axes.plot(*scaled(pareto.path), ".", color=FOUND, alpha=0.4, label="best of a generation")
        axes.plot(*scaled(pareto.path[-1:]), "*", color=FOUND, markersize=12, label="found")
    every = [value for _, value in (*pareto.curve, pareto.even, *pareto.path)]
    # a divergence may be exactly 0, which has no logarithm
    if 0 < 20 * min(every) < max(every):
        axes.set_yscale("log")
    axes.set_xlabel("file of weights, kB", fontsize=9)
    axes.set_ylabel(pareto.measure, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def scaled(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Return kB and fitness of points."""
    return [size / 1000 for size, _ in points], [value for _, value in points]
