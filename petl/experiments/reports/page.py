"""Self-contained HTML pages: frame, building blocks, and charts as inline SVG.

Templates, styles and the script are files in assets/. A page loads nothing, and works without its
script, which only sorts tables and shows values faster. matplotlib draws the charts. Its import
takes a second, so each function imports it when it draws.
"""

import base64
import io
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import escape

from jinja2 import Environment, FileSystemLoader

from petl.core.model.heat_map import cell_text
from petl.core.types import Arguments
from petl.errors import printable
from petl.experiments.reports.formatting import number
from petl.system.files.disk import open_inside
from petl.training.features.section import Curve, Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from petl.training.features.bars import Bars

ASSETS = Path(__file__).with_name("assets")


def render_page(
    title: str,
    body: str,
    *,
    about: str = "",
    links: Mapping[str, str] | None = None,
    **values: object,
) -> str:
    """Return an HTML page with this title.

    Args:
        body: a template in assets/, rendered with `values`; `blocks` has the macros of page.html.
        about: a line below the title.
        links: addresses by name, below that; see `address`.
    """
    blocks: Any = _environment().get_template("page.html").module
    page = blocks.page(
        title=title,
        about=about,
        links=links or {},
        style=(ASSETS / "style.css").read_text(),
        script=(ASSETS / "page.js").read_text(),
        inner=_environment().get_template(body).render(title=title, blocks=blocks, **values),
    )
    return printable(page)  # among others, characters that UTF-8 cannot encode


@cache
def _environment() -> Environment:
    # autoescape: names and messages of users may contain HTML
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "cell": cell_text}
    return environment


def address(file: Path, folder: Path, *, back: str = "") -> str:
    """Return the address of a file in a page of `folder`: relative, so that both can be moved.

    Args:
        back: name of the page in `folder`, to which the other page then links back.
    """
    target, origin = file.absolute(), folder.absolute()
    if target.drive != origin.drive:  # of Windows: no relative path exists
        return target.as_uri()
    fragment = f"#back={_relative(origin / back, target.parent)}" if back else ""
    return _relative(target, origin) + fragment


def _relative(file: Path, folder: Path) -> str:
    # quoted, so that a name with a colon is no scheme
    return quote(Path(os.path.relpath(file, folder)).as_posix(), safe="/")


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
SPOT = 16  # points, the side of the mark of a point
MOST_MARKS = 150  # places of a chart that show their values under the pointer
MARKERS = "osD^vP*Xph<>8"
DOTTED = 30  # curves of at most this many points have a dot at each point
LEGEND_WIDTH = 36  # characters; longer names are wrapped
LOG_RATIO = 8  # largest over smallest cost, above which the axis is logarithmic


class Point(NamedTuple):
    """A score with its standard deviation, and what it costs."""

    name: str
    cost: float
    score: float
    spread: float


def chart(data: "Lines | Bars") -> str:
    """Draw a chart of a section; return an SVG element."""
    if isinstance(data, Lines):
        return line_chart(data.curves, data.title, x=data.x, y=data.y, marked=data.marked)
    return column_chart(data)


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
        description = f"{title}: {', '.join(curve.name for curve in curves)}"
        return _svg(figure, description, lambda: _columns(axes, curves, x))


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
        return _svg(figure, f"{title}: {', '.join(map(str, values))}")


def cost_chart(
    points: Sequence[Point | None],
    title: str,
    *,
    x: str,
    y: str,
    higher_is_better: bool,
    maximum: float | None = None,
) -> str:
    """Draw scores against a cost, with a line through the best score at each cost; return SVG.

    The markers are named by `cost_legend`, by place: None is one that has no such cost.
    """
    known = [point for point in points if point is not None]
    costs = [point.cost for point in known]
    best = pareto_front(known, higher_is_better=higher_is_better)
    with _figure(HEIGHT) as figure:
        axes = figure.add_subplot()
        front_costs, front_scores = [p.cost for p in best], [p.score for p in best]
        axes.step(front_costs, front_scores, where="post", color="0.6", linestyle="--", zorder=1)
        for i, point in enumerate(points):
            if point is None:
                continue
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
        # a logarithmic axis has no place for 0
        if max(costs) > LOG_RATIO * min(costs) > 0:
            axes.set_xscale("log")
            # not rounded to decades, which would leave much of the chart empty
            axes.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
            set_log_ticks(axes.xaxis, max(costs) / min(costs))
        else:  # from 0, so that distances are proportional to costs
            axes.update_datalim([(0, known[0].score)])
            axes.autoscale_view(scaley=False)
        description = f"{title}: {', '.join(point.name for point in known)}"
        return _svg(figure, description, lambda: [_spot(axes, point, x, y) for point in known])


class Mark(NamedTuple):
    """A rectangle of a chart, in points from its lower left corner, and its text."""

    x: float
    y: float
    width: float
    height: float
    text: str


def column_chart(chart: "Bars") -> str:
    """Draw bars side by side, each with its text under the pointer; return an SVG element."""
    with _figure(HEIGHT) as figure:
        axes = figure.add_subplot()
        has_legend = resolve_name("petl.training.features.bars:add_bars")(axes, chart, COLORS)
        names = axes.xaxis.get_major_formatter()  # of the bars, not the numbers of their places
        _finish(axes, chart.title, chart.x, chart.y, None)
        axes.xaxis.set_major_formatter(names)
        if has_legend:  # two columns: paths are long
            figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, chart.title, lambda: _bar_marks(axes, chart))


def _bar_marks(axes: "Axes", chart: "Bars") -> list[Mark]:
    """One mark for each bar, as high as the chart."""
    frame = axes.bbox
    ends = [axes.transData.transform((i - 0.5, 0))[0] for i in range(len(chart.bars) + 1)]
    return [
        Mark(left, frame.y0, right - left, frame.height, bar.text)
        for bar, (left, right) in zip(chart.bars, pairwise(ends), strict=True)
    ]


def _columns(axes: "Axes", curves: Sequence[Curve], x: str) -> list[Mark]:
    """One mark for each place of the horizontal axis with a value, as high as the chart."""
    values: dict[float, list[str]] = {}
    for curve in curves:
        for place, value in curve.points:
            values.setdefault(place, []).append(f"{curve.name}: {number(value, 4)}")
    places = sorted(values)
    places = places[:: -(-len(places) // MOST_MARKS)]
    frame, spots = axes.bbox, [axes.transData.transform((place, 0))[0] for place in places]
    ends = [frame.x0, *((one + two) / 2 for one, two in pairwise(spots)), frame.x1]
    return [
        Mark(
            left, frame.y0, right - left, frame.height, "\n".join([f"{x} {number(p)}", *values[p]])
        )
        for p, (left, right) in zip(places, pairwise(ends), strict=True)
    ]


def _spot(axes: "Axes", point: Point, x: str, y: str) -> Mark:
    """The mark of a point of `cost_chart`."""
    left, low = axes.transData.transform((point.cost, point.score)) - SPOT / 2
    spread = f" ± {number(point.spread, 3)}" if point.spread else ""
    text = f"{point.name}\n{y}: {number(point.score, 4)}{spread}\n{x}: {number(point.cost, 4)}"
    return Mark(left, low, SPOT, SPOT, text)


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


def _marker(i: int) -> Arguments:
    """Marker and color of the i-th point of `cost_chart`."""
    return {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}", "markersize": 7}


def set_log_ticks(axis: "Axis", ratio: float) -> None:
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
def _figure(height: float) -> Generator["Figure"]:
    """Yield a figure of this height in inches; drawing and saving belong inside the block."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # "default": whatever a user's matplotlibrc contains
    with style.context(["default", ASSETS / "charts.mplstyle"]):
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def _finish(
    axes: "Axes", title: str, x: str, y: str, maximum: float | None, *, values_on_y: bool = True
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


def _svg(figure: "Figure", description: str, marks: Callable[[], Sequence[Mark]] = tuple) -> str:
    """Return the figure as an SVG element that depends on nothing but its content.

    Args:
        marks: called when all is drawn, for places whose texts are shown under the pointer.
    """
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
    text = text.replace("<svg ", '<svg role="img" ', 1).replace(INK, "currentColor")
    for i, color in enumerate(COLORS):  # colors of the page, which are lighter in dark mode
        text = text.replace(f": {color}", f": var(--c{i}, {color})")
    height = figure.bbox.height  # SVG counts from the top
    drawn = "".join(
        f'<rect class="hit" fill-opacity="0" x="{m.x:.1f}" y="{height - m.y - m.height:.1f}" '
        f'width="{m.width:.1f}" height="{m.height:.1f}"><title>{escape(printable(m.text))}</title>'
        "</rect>\n"
        for m in marks()
    )
    return text.removesuffix("</svg>") + drawn + "</svg>"
