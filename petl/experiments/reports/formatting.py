"""Sizes, durations, scores and numbers as text, and tables for the terminal and for markdown."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from textwrap import fill

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from petl.data.tasks.scores import COUNTS, INTERVAL, NOTES, PROPORTIONS, is_percentage
from petl.errors import markdown, printable
from petl.system.output import results

LEVEL = 0.95  # of intervals


def as_yaml(value: object) -> str:
    """Format a value in the syntax of `method.FIELD=VALUE`."""
    try:
        plain = sorted(value) if isinstance(value, set) else value
        return plain if isinstance(plain, str) else json.dumps(plain)
    except TypeError:
        return str(value)  # a nested config


def size(count: int) -> str:
    """Format a number of bytes in kB, MB or GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Format seconds: to a tenth below ten, else rounded, with minutes or hours."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 9.95:  # from here on, `.1f` would round to "10.0 s"
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


def score(name: str, value: float) -> str:
    """Format a score with its unit; a count without decimals."""
    if name in (*COUNTS, *NOTES):
        return f"{value:,.0f}"
    return f"{100 * value:.1f} %" if is_percentage(name) else f"{value:.3f}"


def sample_size(scores: Mapping[str, float]) -> str:
    """What the scores of an evaluation average over: "n = 2,000", "n = 512 tokens"; "" if unknown.

    A count without a unit is one of examples.
    """
    counts = [
        f"{scores[name]:,.0f}" + (f" {name}" if name != "rows" else "")
        for name in COUNTS
        if name in scores
    ]
    return f"n = {', '.join(counts)}" if counts else ""


def wilson(proportion: float, count: float, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a proportion of `count` examples.

    Method 3 of Newcombe 1998 (Statistics in Medicine 17, 857-872). Unlike p ± 1.96 standard errors
    it stays between 0 and 1 and has a width after all right (or all wrong) answers.
    """
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = proportion + z2 / (2 * count)
    reach = math.sqrt(z2 * (proportion * (1 - proportion) + z2 / (4 * count)) / count)
    low, high = ((center + sign * reach) / (1 + z2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)  # rounding may pass 0 or 1


def interval(metric: str, value: float, scores: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the interval of a metric's value on the examples of an evaluation; None without one.

    Args:
        value: the metric, or its mean over evaluations on the same examples.
        scores: an evaluation, which has the number of examples.
    """
    if f"{metric}{INTERVAL}" in scores:
        half = scores[f"{metric}{INTERVAL}"]
        return value - half, value + half
    # others, such as F1, have no interval of this kind; a bootstrap would need single examples
    if metric not in PROPORTIONS or not scores.get("rows"):
        return None
    return wilson(value, scores["rows"])


def sign_test(one: int, other: int) -> float:
    """Return the two-sided p-value of the exact sign test, McNemar's for right and wrong answers.

    The probability of a split as uneven as this, if an example that tells two models apart is as
    likely to favor one as the other.

    Args:
        one: number of examples that favor the first model.
        other: number of those that favor the second.
    """
    total = one + other
    ways = sum_of_ways = 1  # of choosing as many of `total` examples; integers, which are exact
    for chosen in range(min(one, other)):
        ways = ways * (total - chosen) // (chosen + 1)
        sum_of_ways += ways
    return min(1.0, 2 * sum_of_ways / 2**total)


def interval_text(metric: str, limits: tuple[float, float]) -> str:
    """Format an interval of a metric: "51.2 to 70.0 %", "0.312 to 0.348"."""
    if not is_percentage(metric):
        return "{:.3f} to {:.3f}".format(*limits)
    return "{:.1f} to {:.1f} %".format(*(100 * limit for limit in limits))


def count_text(number: float, noun: str) -> str:
    """Format a number of things: "1 run", "1,200 steps", "0.5 epochs"."""
    digits = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{digits} {noun}{'s' * (number != 1)}"


def seeds_text(seeds: Sequence[int]) -> str:
    """Format seeds: "3 seeds (0, 1, 2)", more than ten of them without their numbers."""
    listed = f" ({', '.join(map(str, seeds))})" if len(seeds) <= 10 else ""
    return f"{count_text(len(seeds), 'seed')}{listed}"


def mean_text(metric: str, values: Sequence[float]) -> str:
    """Format the mean over seeds with the standard deviation: "61.0 ± 1.0 %"; one value alone."""
    mean = score(metric, statistics.fmean(values))
    if len(values) < 2:
        return mean
    return f"{mean.removesuffix(' %')} ± {score(metric, statistics.stdev(values))}"


def number(value: float, digits: int = 6) -> str:
    """Format a number in few characters: 12,000 and 0.05, but 1e-06.

    >>> number(12000.0), number(0.05), number(0.000001)
    ('12,000', '0.05', '1e-06')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        is_long = abs(value) >= 10 ** (digits - 1)  # `g` would switch to an exponent
        return f"{value:,.0f}" if is_long else f"{value:,.{digits}g}"
    return f"{value:.{digits}g}"


def echo(text: object = "", *, end: str = "\n") -> None:
    """Print text to standard output, control characters escaped."""
    results().write(f"{printable(text)}{end}")


# Tables


@dataclass(frozen=True)
class Table:
    """A table of strings; the first column holds names, the others numbers.

    Attributes:
        links: by (row, column), the file that a cell is about; for pages.
    """

    columns: list[str]
    rows: list[list[str]]
    links: Mapping[tuple[int, int], Path] = field(default_factory=dict)

    def markdown(self) -> str:
        """Return the table in markdown, columns of numbers aligned to the right."""
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        head, *rows = ([markdown(cell) for cell in row] for row in (self.columns, *self.rows))
        return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))

    def print(self, title: str = "") -> None:
        """Print the table with `print_table`."""
        first, *others = self.columns
        print_table([first, *(f">{name}" for name in others)], self.rows, title)


PLAIN_WIDTH = 10_000  # characters: no line is wrapped when the output is not a terminal
INDENT, BETWEEN = "  ", " · "  # of the cells of a record
NARROW = 100  # characters: a terminal below this shows records where a table does not fit


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a table below its title; a column whose name begins with ">" is right-aligned.

    On a narrow terminal, a table that does not fit is printed as records: one line per cell.
    """
    console = Console(file=results(), highlight=False)
    columns, *cells = ([_cell(value) for value in row] for row in (columns, *rows))
    table = RichTable(
        box=SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        show_edge=False,
    )
    for i, name in enumerate(columns):
        justify = "right" if name.startswith(">") else "left"
        # the first column holds names that users copy, so they are not broken
        table.add_column(name.removeprefix(">"), justify=justify, overflow="fold", no_wrap=i == 0)
    for row in cells:
        table.add_row(*row)
    if title:  # not rich's own title, which wraps at the width of the table
        console.print(_cell(title), style="bold", soft_wrap=True)
    if console.is_terminal:
        width = console.measure(table, options=console.options.update(width=PLAIN_WIDTH)).maximum
        fits = width <= console.width
        if fits or console.width >= NARROW:
            console.print(table)
        else:
            _print_records(console, columns, cells)
        return
    console.width = PLAIN_WIDTH
    with console.capture() as captured:
        console.print(table)
    results().writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _cell(value: object) -> str:
    """Format a value on one line, without meaning for the terminal or for rich."""
    return escape(printable(value).replace("\n", r"\n").replace("\t", r"\t"))


def _print_records(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print each row as its first cell and, indented, the other cells by column name."""
    for first, *others in rows:
        console.print(first, style="bold", soft_wrap=True)
        names = (name.removeprefix(">") for name in columns[1:])
        parts = [
            f"{name}: {cell}" if name else cell
            for name, cell in zip(names, others, strict=False)
            if cell
        ]
        for line in _packed(parts, console.width - len(INDENT)):
            # words stay whole, so that paths and names can be copied
            console.print(
                fill(
                    line,
                    console.width,
                    initial_indent=INDENT,
                    subsequent_indent=2 * INDENT,
                    break_long_words=False,
                    break_on_hyphens=False,
                ),
                soft_wrap=True,
            )


def _packed(parts: Sequence[str], width: int) -> list[str]:
    """Join neighbors that fit on a line."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(BETWEEN) + len(part) <= width:
            lines[-1] += BETWEEN + part
        else:
            lines.append(part)
    return lines
