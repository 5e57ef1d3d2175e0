"""A terminal as a picture: lines of text in SVG."""

import textwrap
from collections.abc import Iterable
from html import escape

COLUMNS, LINE, GLYPH = 96, 20, 7.8  # characters of a line; pixels of a line, of a character
COMMAND, ANSWER, FAILURE = "#8fd18f", "#d7dce2", "#f2b8b8"


def drawn(title: str, lines: Iterable[tuple[str, str]]) -> str:
    """The SVG of lines, each with its color; long ones are wrapped.

    Args:
        title: what a screen reader says.
    """
    wrapped = [
        (part, color) for text, color in lines for part in textwrap.wrap(text, COLUMNS) or [""]
    ]
    rows = [
        f'<text x="14" y="{28 + LINE * i}" fill="{color}">{escape(text)}</text>'
        for i, (text, color) in enumerate(wrapped)
        if text
    ]
    width, height = int(COLUMNS * GLYPH) + 28, LINE * len(wrapped) + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#1e2227"/>\n'
        '<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" '
        f'xml:space="preserve">\n{chr(10).join(rows)}\n</g>\n</svg>\n'
    )
