"""A part of a run's page as data, which the reports draw: text, charts, heat maps, pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from petl.core.model.heat_map import HeatMap

if TYPE_CHECKING:
    from petl.training.features.bars import Bars


@dataclass(frozen=True)
class Curve:
    """A named sequence of points (x, y), x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


class Lines(NamedTuple):
    """A chart of curves over the same axes.

    Attributes:
        title: one line.
        x, y: labels of the axes.
        curves: each with at least one point, all values finite.
        marked: name and place of a vertical line.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    marked: tuple[str, float] | None = None


class ColoredText(NamedTuple):
    """A text whose parts are colored.

    Attributes:
        title: a line above it.
        pieces: its parts in their order, each with a number: above 0 is worse; None: not colored.
    """

    title: str
    pieces: Sequence[tuple[str, float | None]]


class Examples(NamedTuple):
    """A table of texts.

    Attributes:
        header: names of the columns.
        rows: a cell for each of these.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page of a run.

    Attributes:
        title: its heading.
        text: sentences below it.
        line: for the terminal, at the end of the run.
        pictures: PNG files of the folder that the section shows.
        drawn: PNG files of the folder whose content is among charts and heat maps.
        alarm: a sentence in red.
        passages: colored texts, side by side.
        examples: a table below them.
    """

    title: str
    text: str = ""
    charts: "Sequence[Lines | Bars]" = ()
    heat_maps: Sequence[HeatMap] = ()
    line: str = ""
    pictures: Sequence[str] = ()
    drawn: Sequence[str] = ()
    alarm: str = ""
    passages: Sequence[ColoredText] = ()
    examples: Examples | None = None
