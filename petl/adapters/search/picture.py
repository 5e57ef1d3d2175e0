"""The picture of a search: bytes against fitness, of even settings and of what was found."""

from collections.abc import Sequence
from pathlib import Path

from petl.adapters.search.records import SearchRecord
from petl.adapters.search.units import Feature
from petl.core.model.heat_map import save_figure

Point = tuple[float, float]  # bytes and fitness
EVEN, FOUND = "0.45", "#1f5fa8"
AXES = {"kl": "divergence from the adapter, nats", "loss": "loss, nats"}
CURVE = 8  # even states at most


def uniform(levels: Sequence[int]) -> list[list[int]]:
    """Return states in which all units have one level, as far as they have it; `CURVE` at most."""
    top = max(levels)
    step = -(-top // CURVE)
    chosen = sorted({*range(step - 1, top, step), 0, top - 1})
    return [[min(level, count - 1) for count in levels] for level in chosen]


def draw(record: SearchRecord, feature: Feature, path: Sequence[Point], file: Path) -> None:
    """Draw a search as a PNG file.

    Args:
        path: the best state of each generation; empty without a search.
    """
    # its import takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=200, layout="constrained")
    axes = figure.subplots()
    what, metric = record.settings.what, record.settings.metric
    axes.set_title(f"{what}: even settings and the search", fontsize=10)
    curve = [(size, value) for size, value in record.curve]
    sizes, values = scaled(curve)
    axes.plot(sizes, values, "o-", color=EVEN, markersize=4, label="all units at one level")
    longest = max(feature.units, key=lambda unit: unit.levels)
    states = uniform([unit.levels for unit in feature.units])
    for size, value, state in zip(sizes, values, states, strict=True):
        label, place = f"{longest.values[max(state)]:g}", (size, value)
        axes.annotate(label, place, (0, 6), textcoords="offset points", fontsize=7, ha="center")
    even = (feature.bytes_of(record.even), record.even_fitness)
    axes.plot(*scaled([even]), "s", color=EVEN, markersize=7, label="even, at the budget")
    if path:
        axes.plot(*scaled(path), ".", color=FOUND, alpha=0.4, label="best of a generation")
        axes.plot(*scaled(path[-1:]), "*", color=FOUND, markersize=12, label="found")
    every = [value for _, value in (*curve, even, *path)]
    # a divergence may be exactly 0, which has no logarithm
    if 0 < 20 * min(every) < max(every):
        axes.set_yscale("log")
    axes.set_xlabel("file of weights, kB", fontsize=9)
    axes.set_ylabel(AXES[metric], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, file)


def scaled(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Return kB and fitness of points."""
    return [size / 1000 for size, _ in points], [value for _, value in points]
