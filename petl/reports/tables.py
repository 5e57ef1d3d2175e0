"""Tables on standard output: with rules in a terminal, else one plain line a row."""

import sys
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
