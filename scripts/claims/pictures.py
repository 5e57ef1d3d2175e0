"""Pictures of the intervals, and how results become those that the pages show."""

from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from claims.catalog import CLAIMS
from claims.claim import Claim, Statement
from claims.page import judged
from claims.results import Result, read

WIDTH = 46  # characters of a line of a statement


def publish(folder: Path, results: Path, assets: Path, names: Collection[str]) -> list[str]:
    """Copy the results of a folder, draw their pictures, and return the names of its claims.

    Args:
        folder: of `scripts/claims.py`.
        results: folder of the published results.
        assets: folder of the pictures.
        names: of the claims that are published, where they have results.

    Raises:
        InputError: the results are of other comparisons.
    """
    found = [(folder / f"{name}.json", CLAIMS[name]) for name in CLAIMS if name in names]
    found = [(file, claim) for file, claim in found if file.exists()]
    for file, claim in found:
        result = read(file)
        result.refuse_unknown(claim)
        result.write(results)
        if any(map(result.is_complete, claim.statements)):
            assets.mkdir(parents=True, exist_ok=True)
            draw(claim, result, assets / f"{claim.name}.svg")
        if result.curves:
            assets.mkdir(parents=True, exist_ok=True)
            draw_curves(claim, result, assets / f"{claim.name}-curves.svg")
    return [claim.name for _, claim in found]


def draw_curves(claim: Claim, result: Result, file: Path) -> None:
    """Draw the validation losses of the contenders, mean and range over seeds, as an SVG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for words, curve in result.curves.items():
        steps = [int(step) for step in curve]
        axes.plot(steps, [fmean(losses) for losses in curve.values()], label=claim.labels[words])
        lowest, highest = ([end(losses) for losses in curve.values()] for end in (min, max))
        axes.fill_between(steps, lowest, highest, alpha=0.2, linewidth=0)
    axes.set_xlabel("steps", fontsize=8)
    axes.set_ylabel("validation loss, nats: mean and range over seeds", fontsize=8)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, claim, file)


def save(figure: Any, claim: Claim, file: Path) -> None:
    """Write a figure as an SVG file that is the same for the same results."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": claim.name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def draw(claim: Claim, result: Result, file: Path) -> None:
    """Draw the intervals of the finished statements of a claim as an SVG file."""
    from matplotlib.figure import Figure

    done = [each for each in reversed(claim.statements) if result.is_complete(each)]
    panels = [[each for each in done if each.measure is measure] for measure in claim.measures]
    panels = [statements for statements in panels if statements]
    heights = [0.5 + 0.62 * len(statements) for statements in panels]
    figure = Figure(figsize=(7.6, 0.6 + sum(heights)), layout="constrained")
    column = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, statements in zip(column, panels, strict=True):
        draw_panel(result, statements, axes)
    save(figure, claim, file)


def draw_panel(result: Result, statements: list[Statement], axes: Any) -> None:
    """Draw the intervals of statements about one measure, from the bottom."""
    measure = statements[0].measure
    for place, statement in enumerate(statements):
        estimate = result.estimates[statement.key]
        low, high = sorted(map(measure.shown, estimate.interval()))
        edges = sorted(map(measure.shown, margins(statement)))
        axes.barh(place, edges[1] - edges[0], 0.7, edges[0], color="0.92", zorder=0)
        axes.hlines(place, low, high, linewidth=2)
        axes.plot(measure.shown(estimate.mean), place, "o", color="C0")
        axes.annotate(
            judged(statement, result).word,
            (high, place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(measure.shown(0), color="0.5", linewidth=0.8)
    says = [fill(statement.says, WIDTH) for statement in statements]
    axes.set_yticks(range(len(statements)), says, fontsize=8)
    axes.margins(x=0.18)
    unit = f" in {measure.unit}" if measure.unit else ""
    what = "ratio" if measure.ratio else f"difference{unit}"
    axes.set_xlabel(f"{measure.title}: {what}, 95 % interval; gray: the margin", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def margins(statement: Statement) -> tuple[float, float]:
    """Return the two ends of the margin of a statement, on the scale that is compared."""
    if statement.kind == "share":
        return statement.border, 0
    low = 0 if statement.kind == "beats" else -statement.border
    return low, 0 if statement.kind == "no_worse" else statement.border
