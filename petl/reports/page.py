"""Self-contained HTML pages: frame, style, and charts as inline SVG.

matplotlib draws the charts. Its import takes a second, so each function imports it when it draws.
"""

import base64
import io
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from jinja2 import Environment

from petl.errors import printable
from petl.files.safe_open import open_inside
from petl.reports.formatting import number


def render_page(title: str, body: str, **values: Any) -> str:
    """Return an HTML page with this title.

    Args:
        body: a jinja2 template, rendered with `values`.
    """
    # autoescape: names and messages of users may contain HTML
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    inner = environment.from_string(body).render(title=title, **values)
    page = environment.from_string(FRAME).render(title=title, style=STYLE, inner=inner)
    return printable(page)  # among others, characters that UTF-8 cannot encode


def embed_png(file: Path) -> str:
    """Return a PNG file as a data URL, for the `src` of an image."""
    with open_inside(file) as opened:
        return f"data:image/png;base64,{base64.b64encode(opened.read()).decode()}"


# Charts

WIDTH, HEIGHT = 4.9, 3.1  # inches; 4.9 in are 470 CSS pixels, so a 500 px window does not shrink it
INK = "#222222"  # replaced by currentColor in the SVG, so that text follows the page's dark mode
# Okabe and Ito's palette, readable for color-blind people; dashes tell curves apart in grayscale
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*Xph<>8"
DOTTED = 30  # curves of at most this many points have a dot at each point
LEGEND_WIDTH = 36  # characters; longer names are wrapped
LOG_RATIO = 8  # largest over smallest cost, above which the axis is logarithmic
RC = {
    "svg.hashsalt": "petl",  # ids inside the SVG depend on its content alone
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    # limits are the ticks just outside of the data, so that no curve leaves the last tick behind
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """A named sequence of points (x, y), x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


class Point(NamedTuple):
    """A score with its standard deviation, and what it costs."""

    name: str
    cost: float
    score: float
    spread: float


def line_chart(
    curves: Sequence[Curve],
    title: str,
    *,
    x: str,
    y: str,
    maximum: float | None = None,
    marked: tuple[str, float] | None = None,
) -> str:
    """Draw curves over the same axes; return an SVG element.

    Args:
        curves: at least one, each with at least one point, all values finite.
        title: above the chart.
        x: label of the horizontal axis, which starts at 0.
        y: label of the vertical axis, with its unit.
        maximum: the largest value that `y` can have, if there is one.
        marked: name and place of a vertical line.
    """
    with _figure(HEIGHT) as figure:
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            axes.plot(
                *zip(*curve.points, strict=True),
                DASHES[i % len(DASHES)],
                color=COLORS[i % len(COLORS)],
                marker="o" if len(curve.points) <= DOTTED else "",
                markersize=4,
                label=curve.name,
                clip_on=False,  # a dot on the frame stays round
            )
        if marked is not None:
            name, place = marked
            axes.axvline(place, color=INK, linestyle=":", linewidth=1, label=name)
        axes.update_datalim([(0, curves[0].points[0][1])])  # the steps start at 0
        axes.autoscale_view()
        _finish(axes, title, x, y, maximum)
        if len(curves) > 1 or marked is not None:
            figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure, f"{title}: {', '.join(curve.name for curve in curves)}")


def bar_chart(values: Mapping[str, float], title: str, *, x: str, unit: str) -> str:
    """Draw a horizontal bar for each name with its value and percentage; return an SVG element.

    Args:
        values: at least one, none below 0, the sum above 0.
        x: label of the axis.
        unit: of the values.
    """
    total = sum(values.values())
    with _figure(1.0 + 0.26 * len(values)) as figure:
        axes = figure.add_subplot()
        bars = axes.barh(
            list(map(printable, values)), list(values.values()), height=0.7, color=COLORS[0]
        )
        labels = [f"{number(v, 3)} {unit}, {_percent(v / total)}" for v in values.values()]
        axes.bar_label(bars, labels, padding=4)
        axes.set_ylim(len(values) - 0.5, -0.5)  # the first name at the top
        axes.grid(visible=False, axis="y")
        _finish(axes, title, x, "", None, values_on_y=False)
        return _svg(figure, f"{title}: {', '.join(values)}")


def cost_chart(
    points: Sequence[Point],
    title: str,
    *,
    x: str,
    y: str,
    higher_is_better: bool,
    maximum: float | None = None,
) -> str:
    """Draw scores against a cost, with a line through the best score at each cost; return SVG.

    The markers are named by `cost_legend`.
    """
    costs = [point.cost for point in points]
    best = pareto_front(points, higher_is_better=higher_is_better)
    with _figure(HEIGHT) as figure:
        axes = figure.add_subplot()
        front_costs, front_scores = [p.cost for p in best], [p.score for p in best]
        axes.step(front_costs, front_scores, where="post", color="0.6", linestyle="--", zorder=1)
        for i, point in enumerate(points):
            axes.errorbar(
                point.cost,
                point.score,
                yerr=point.spread or None,
                linestyle="none",
                capsize=3,
                clip_on=False,
                **_marker(i),
            )
        _finish(axes, title, x, y, maximum)
        if max(costs) > LOG_RATIO * min(costs):
            axes.set_xscale("log")
            # not rounded to decades, which would leave much of the chart empty
            axes.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
            set_log_ticks(axes.xaxis, max(costs) / min(costs))
        else:  # from 0, so that distances are proportional to costs
            axes.update_datalim([(0, points[0].score)])
            axes.autoscale_view(scaley=False)
        return _svg(figure, f"{title}: {', '.join(point.name for point in points)}")


def cost_legend(names: Sequence[str]) -> str:
    """Draw the legend of `cost_chart` for points in this order; return an SVG element."""
    from matplotlib.lines import Line2D

    labels = [fill(name, LEGEND_WIDTH) for name in names]
    lines = 2 + sum(label.count("\n") + 1 for label in labels)
    with _figure(0.3 + 0.19 * lines) as figure:
        handles = [Line2D([], [], linestyle="none", **_marker(i)) for i in range(len(names))]
        handles.append(Line2D([], [], color="0.6", linestyle="--"))
        labels.append("best score at this cost or less")
        title = "mean ± standard deviation over seeds"
        figure.legend(handles, labels, loc="upper left", title=title, alignment="left")
        return _svg(figure, "legend")


def _marker(i: int) -> dict[str, Any]:
    """Marker and color of the i-th point of `cost_chart`."""
    return {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}", "markersize": 7}


def set_log_ticks(axis: Any, ratio: float) -> None:
    """Put round numbers that do not overlap on a logarithmic axis whose ends have this ratio."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def pareto_front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """Return the points that no other point beats in both cost and score, by ascending cost."""
    sign = 1 if higher_is_better else -1
    # by ascending cost, so that a point is on the front if it beats all points before it
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -sign * p.score)):
        if not front or sign * point.score > sign * front[-1].score:
            front.append(point)
    return front


def _percent(fraction: float) -> str:
    """Format a fraction of time; a small one is not rounded to 0 %."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.005 else "< 1 %"


@contextmanager
def _figure(height: float) -> Generator[Any]:
    """Yield a figure of this height in inches; drawing and saving belong inside the block."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", RC]):  # "default": whatever a user's matplotlibrc contains
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def _finish(
    axes: Any, title: str, x: str, y: str, maximum: float | None, *, values_on_y: bool = True
) -> None:
    """Set title, labels and number formats, and the upper limit of the vertical axis."""
    from matplotlib.ticker import FuncFormatter

    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis in (axes.xaxis, axes.yaxis) if values_on_y else (axes.xaxis,):
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    if maximum is not None:
        axes.set_ylim(top=min(axes.get_ylim()[1], maximum))


def _svg(figure: Any, description: str) -> str:
    """Return the figure as an SVG element that depends on nothing but its content."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # matplotlib cannot measure all characters
        text.set_text(printable(text.get_text()))
    file = io.StringIO()
    # no date and no version of matplotlib in the file
    metadata = {
        "Title": printable(description),
        "Date": None,
        "Creator": None,
        "Type": None,
        "Format": None,
    }
    for background in (figure, *figure.axes):
        background.patch.set_visible(False)
    FigureCanvasSVG(figure).print_svg(file, metadata=metadata)  # savefig would draw twice
    text = file.getvalue()
    text = text[text.index("<svg") :].rstrip()  # without XML header and doctype, to stand in HTML
    text = re.sub(r' id="[a-z][\w.]*_\d+"', "", text)  # would repeat in each chart of a page
    return text.replace("<svg ", '<svg role="img" ', 1).replace(INK, "currentColor")


# The frame

STYLE = """\
:root { color-scheme: light dark; --line: #ddd; --block: #f6f6f6; --muted: #5a5a5a; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --block: #222; --muted: #aaa; }
  body { background: #161616; color: #e6e6e6; }
  img { background: #fff; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
.sub { color: var(--muted); margin-top: -.6rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
.examples th, .examples td { text-align: left; vertical-align: top; max-width: 30rem; }
.examples td { white-space: pre-wrap; overflow-wrap: anywhere; }
.examples th:first-child, .examples td:first-child { min-width: 0; }
.examples td:nth-child(2) { min-width: 16rem; }
.matrix td + td { text-align: center; }
img { max-width: 100%; height: auto; }
svg { width: 100%; height: auto; max-width: 38rem; }
figure { margin: 0; break-inside: avoid; }
.charts { display: grid; gap: 1rem;
          grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
pre { font-size: 12px; line-height: 1.4; background: var(--block); padding: .7rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
  th, td { padding: .25rem .4rem; font-size: 13px; }
  th, td:first-child { white-space: normal; }
}
@media print {
  body { margin: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  .wide { overflow-x: visible; }
  .wide table { font-size: 8pt; }
  th, td { padding: .2rem .35rem; }
  th, td:first-child { white-space: normal; }
  .charts { grid-template-columns: 1fr 1fr; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

FRAME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{{ inner | safe }}
</body>
</html>
"""
