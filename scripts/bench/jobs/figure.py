"""The figure of a job: validation score against processor seconds, a line for each variant."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.jobs.definitions import PLAIN

Curve = Sequence[tuple[float, float]]  # processor seconds and score


def draw(title: str, metric: str, curves: Mapping[str, Curve], file: Path) -> None:
    """Draw curves as an SVG file.

    Args:
        curves: by variant: seconds since the process began, without its evaluations, and scores.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    is_share = metric == "accuracy"
    # without a salt and a date of its own, the same results give the same file
    with mpl.rc_context({"svg.hashsalt": "job", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, curve in curves.items():
            scores = [score * (100 if is_share else 1) for _, score in curve]
            style = ":" if name.startswith(PLAIN) else "-"
            axes.plot([x for x, _ in curve], scores, style, marker="o", markersize=3, label=name)
        seconds_axis(axes)
        axes.set(
            title=title,
            xlabel="processor seconds since the start of the process, without evaluations",
            ylabel=f"validation {metric}{' (%)' if is_share else ''}",
        )
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def seconds_axis(axes: Any) -> None:
    """Make the x axis of a matplotlib figure logarithmic, with plain numbers."""
    axes.set_xscale("log", subs=(1, 2, 5))
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
