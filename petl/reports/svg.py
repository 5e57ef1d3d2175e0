"""Curves and bars as SVG, drawn without any package: sharp in print, and part of the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 476, 270
LEFT, RIGHT, TOP, BOTTOM = 96, 14, 34, 46  # margins around the axes
LETTER = 7.2  # width of a letter of the legend, about
# told apart in colour, in grey and by a reader who sees no red or green
STROKES = (("#0b559f", ""), ("#c55a11", "7 3"), ("#5f5f5f", "2 3"), ("#111111", "9 3 2 3"))
DOTTED = 30  # up to so many points of a curve are marked


@dataclass(frozen=True)
class Curve:
    """A named sequence of points (x, y), x rising."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its place on the page."""

    low: float
    high: float
    start: float  # where `low` is, in pixels
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def round_numbers(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`.

    >>> round_numbers(0, 370)
    [0, 100, 200, 300]
    """
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def curves(lines: Sequence[Curve], *, x: str, y: str) -> str:
    """A chart of curves over the same axes, as an SVG element.

    Args:
        lines: with at least one point between them, all of them finite.
        x: what the horizontal axis shows, from 0, with its unit.
        y: what the vertical one does.
    """
    points = [point for line in lines for point in line.points]
    across = Axis(*spread([0.0, *(p[0] for p in points)]), LEFT, WIDTH - RIGHT)
    up = Axis(*spread([p[1] for p in points]), HEIGHT - BOTTOM, TOP)
    parts = [*grid(across, up, x, y)]
    place = LEFT
    for i, line in enumerate(lines):
        color, dashes = STROKES[i % len(STROKES)]
        parts += trace(line, across, up, color, dashes)
        if len(lines) > 1:
            parts.append(stroke([(place, 16), (place + 26, 16)], color, dashes))
            parts.append(text(place + 32, 20, line.name, anchor="start"))
            place += 52 + round(LETTER * len(line.name))
    return svg(parts, HEIGHT, f"{', '.join(line.name for line in lines)} against {x}")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The range to show of these values: theirs, with some room if they are all but equal."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        room = abs(low) / 10 or 1.0
        return low - room, high + room
    return low, high


def grid(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    parts = []
    for tick in round_numbers(across.low, across.high):
        at = across.place(tick)
        parts.append(stroke([(at, up.start), (at, up.end)], "#dddddd"))
        parts.append(text(at, up.start + 17, number(tick)))
    for tick in round_numbers(up.low, up.high):
        at = up.place(tick)
        parts.append(stroke([(across.start, at), (across.end, at)], "#dddddd"))
        parts.append(text(across.start - 7, at + 4, number(tick), anchor="end"))
    corners = [(across.start, up.end), (across.start, up.start), (across.end, up.start)]
    parts.append(stroke(corners, "#333333"))
    parts.append(text((across.start + across.end) / 2, up.start + 37, x))
    middle = (up.start + up.end) / 2
    parts.append(text(16, middle, y, turn=f' transform="rotate(-90 16 {middle:g})"'))
    return parts


def trace(line: Curve, across: Axis, up: Axis, color: str, dashes: str) -> list[str]:
    places = [(across.place(a), up.place(b)) for a, b in line.points]
    parts = [stroke(places, color, dashes, width=1.8)]
    if len(places) <= DOTTED:
        dot = '<circle cx="{:.1f}" cy="{:.1f}" r="2.6" fill="' + color + '"/>'
        parts += [dot.format(*place) for place in places]
    return parts


def bars(lengths: Mapping[str, float], *, unit: str) -> str:
    """A bar for each name, with its value and its share of the sum, as an SVG element.

    Args:
        lengths: at least one, none below 0, the sum above 0.
        unit: of the values.
    """
    total, longest, height = sum(lengths.values()), max(lengths.values()), 24
    left = 20 + round(LETTER * max(map(len, lengths)))
    room = WIDTH - left - 125
    parts = []
    for i, (name, length) in enumerate(lengths.items()):
        top = 6 + i * height
        wide = max(1.0, room * length / longest)
        parts.append(text(left - 8, top + 13, name, anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{top}" width="{wide:.1f}" height="17" fill="{STROKES[0][0]}"/>'
        )
        said = f"{number(length, 3)} {unit}, {100 * length / total:.0f} %"
        parts.append(text(left + wide + 8, top + 13, said, anchor="start"))
    return svg(parts, 12 + height * len(lengths), f"{', '.join(lengths)} in {unit}")


def number(value: float, digits: int = 6) -> str:
    """A number in few characters: 12,000 and 0.05, but 1e-06.

    >>> number(12000.0), number(0.05), number(0.000001)
    ('12,000', '0.05', '1e-06')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        whole = abs(value) >= 10 ** (digits - 1)
        return f"{value:,.0f}" if whole else f"{value:,.{digits}g}"
    return f"{value:.{digits}g}"


def stroke(
    points: Sequence[tuple[float, float]], color: str, dashes: str = "", *, width: float = 1.0
) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashed}/>'
    )


def text(x: float, y: float, words: str, *, anchor: str = "middle", turn: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'


def svg(parts: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" font-family="sans-serif" font-size="13" '
        f'fill="#222222" role="img"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )
