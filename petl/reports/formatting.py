"""Bytes and seconds in words, and tables on standard output."""

import sys
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def size(count: int) -> str:
    """Bytes in kB, MB or GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Seconds to a tenth where they are few, else whole ones, with minutes or hours."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


PLAIN_WIDTH = 10_000  # columns when the output is no terminal


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a table below its title; a column whose name begins with ">" is set to the right."""
    console = Console(highlight=False)
    table = Table(
        box=SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        show_edge=False,
    )
    for name in columns:
        justify = "right" if name.startswith(">") else "left"
        table.add_column(name.removeprefix(">"), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    if title:  # not rich's, which it breaks at the width of the table
        console.print(escape(title), style="bold", soft_wrap=True)
    if console.is_terminal:
        console.print(table)
        return
    console.width = PLAIN_WIDTH
    with console.capture() as captured:
        console.print(table)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
