"""Pictures of the intervals, and how results become those that the pages show."""

from pathlib import Path
from textwrap import fill

from claims.catalog import CLAIMS
from claims.claim import Claim
from claims.page import POINTS, judged
from claims.results import Result, read
from petl.errors import InputError

WIDTH = 46  # characters of a line of a statement


def publish(folder: Path, results: Path, assets: Path) -> list[str]:
    """Copy the results of a folder, draw their pictures, and return the names of the claims.

    Args:
        folder: of `scripts/claims.py`.
        results: folder of the published results.
        assets: folder of the pictures.

    Raises:
        InputError: the folder has no results.
    """
    found = [(folder / f"{name}.json", claim) for name, claim in CLAIMS.items()]
    found = [(file, claim) for file, claim in found if file.exists()]
    if not found:
        raise InputError(f"{folder} has no results of claims ({', '.join(CLAIMS)}): try one first")
    for file, claim in found:
        result = read(file)
        result.write(results)
        if any(result.is_complete(i) for i in range(len(claim.statements))):
            assets.mkdir(parents=True, exist_ok=True)
            draw(claim, result, assets / f"{claim.name}.svg")
    return [claim.name for _, claim in found]


def draw(claim: Claim, result: Result, file: Path) -> None:
    """Draw the intervals of the finished statements of a claim as an SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    done = [i for i in range(len(claim.statements)) if result.is_complete(i)]
    # without a salt and a date of its own, the same results give the same file
    with mpl.rc_context({"svg.hashsalt": claim.name, "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.6, 1.1 + 0.62 * len(done)), layout="constrained")
        axes = figure.subplots()
        for place, i in enumerate(reversed(done)):
            estimate, statement = result.estimates[str(i)], claim.statements[i]
            low, high = (POINTS * limit for limit in estimate.interval())
            left = -POINTS * statement.margin if statement.kind == "equals" else 0
            axes.barh(place, POINTS * statement.margin - left, 0.7, left, color="0.92", zorder=0)
            axes.hlines(place, low, high, linewidth=2)
            axes.plot(POINTS * estimate.mean, place, "o", color="C0")
            axes.annotate(
                judged(claim, result, i).word,
                (high, place),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.axvline(0, color="0.5", linewidth=0.8)
        says = [fill(claim.statements[i].says, WIDTH) for i in reversed(done)]
        axes.set_yticks(range(len(done)), says, fontsize=8)
        axes.margins(x=0.18)
        axes.set_xlabel("difference in test accuracy (points), 95 % interval; gray: the margin")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None})
