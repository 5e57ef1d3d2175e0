"""The progress of passes over data: what a pass does, how far it is and how long it still takes.

On a terminal each pass is a bar, elsewhere a log line when it begins and one every `INTERVAL`
seconds. Passes may be nested: the bars of inner ones are below the outer one, and vanish.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import timedelta
from functools import partial
from typing import Generic, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from petl.system.output import has_file

INTERVAL = 10.0  # seconds between log lines of a pass
WIDE = 120  # columns of a terminal with room for long bars
QUIET = 2.0  # seconds for which a quiet pass has no log line
T = TypeVar("T")
logger = logging.getLogger(__name__)


def is_main() -> bool:
    """Return True in the process of rank 0, the only one that shows its progress."""
    return os.environ.get("RANK", "0") == "0"  # as torchrun sets it


class ShortText(ProgressColumn):
    """A column of text that is cut off where the terminal is too narrow."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__()
        self.text = text

    def render(self, task: Task) -> Text:
        """Return the text of a bar."""
        return Text(self.text(task), no_wrap=True, overflow="ellipsis")


class Screen:
    """The bars on the terminal: one display, since a terminal has room for one only."""

    def __init__(self) -> None:
        self.display: Progress | None = None
        self.passes = 0

    def open(self) -> Progress | None:
        """Return the display for one more pass; None if there is no terminal."""
        # stdout is for results, which may be piped
        console = Console(stderr=True)
        # a library's user who did not ask for messages gets no bars
        hidden = has_file() or not console.is_terminal
        if not is_main() or hidden or not logger.isEnabledFor(logging.INFO):
            return None
        if self.display is None:
            # counts and times stay complete on a narrow terminal: they cannot shrink
            fixed = partial(Column, no_wrap=True)
            self.display = Progress(
                ShortText(lambda task: task.description),
                BarColumn(bar_width=40 if console.width >= WIDE else 10, table_column=fixed()),
                MofNCompleteColumn(table_column=fixed()),
                TimeElapsedColumn(table_column=fixed()),
                TextColumn("left", table_column=fixed()),
                TimeRemainingColumn(table_column=fixed()),
                ShortText(lambda task: task.fields["note"]),
                console=console,
                # rich would print on standard error what a program writes to a file or a pipe
                redirect_stdout=sys.stdout.isatty(),
            )
            self.display.start()
        # counted, since an inner pass must not end the display of the outer one
        self.passes += 1
        return self.display

    def close(self) -> None:
        """End a pass; with the last one, the display ends and its bars stay in the terminal."""
        self.passes -= 1
        if self.display and not self.passes:
            self.display.stop()
            self.display = None


SCREEN = Screen()


class Pass:
    """A pass over data, shown on the main process while its block runs.

    Attributes:
        note: further text for the bar, such as the loss.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        unit: str = "batches",
        done: int = 0,
        quiet: bool = False,
        prints: bool = False,
    ) -> None:
        """Describe the pass.

        Args:
            what: it does, such as "scoring the test examples".
            total: its number of units; None: unknown.
            done: units that are over already.
            quiet: show a log line only after `QUIET` seconds, and leave no bar: for passes that
                are usually short, or frequent.
            prints: results go to standard output meanwhile: where that is a terminal, lines are
                shown in place of a bar.
        """
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.has_bar = not (prints and sys.stdout.isatty())
        self.done = self.start = done
        self.note = ""
        self.display: Progress | None = None

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self.display = SCREEN.open() if self.has_bar else None
        # moved back, so that the first line of a quiet pass is due after QUIET seconds
        self.spoke = self.began + (QUIET - INTERVAL if self.quiet else 0.0)
        if self.display:
            self.bar = self.display.add_task(
                self.what, total=self.total, completed=self.done, note=""
            )
        elif not self.quiet:
            self.say(self.opening())
        return self

    def __exit__(self, *_: object) -> None:
        if self.display:
            # more than one: this pass is inside another
            if self.quiet or SCREEN.passes > 1:
                self.display.remove_task(self.bar)
            SCREEN.close()

    def opening(self) -> str:
        """Return the log line of the beginning."""
        if self.total is None:
            return self.what
        unit = self.unit
        if self.total == 1:
            unit = unit.removesuffix("es" if unit == "batches" else "s")
        return f"{self.what}: {self.total:,} {unit}"

    def advance(self, count: int = 1) -> None:
        """Count units that are over."""
        self.done += count
        if self.display:
            self.display.update(self.bar, completed=self.done, note=self.note)
        elif time.monotonic() - self.spoke >= INTERVAL:
            self.say(f"{self.what}: {self.how_far()}")

    def how_far(self) -> str:
        """Return how much is over and, if it is known, how long the rest takes."""
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,} of {self.total:,} {self.unit}, {self.left()} left"

    def left(self) -> timedelta:
        """Return how long the rest takes if each unit takes as long as those that are over."""
        # without units of an earlier run (`start`), whose time is not in this clock
        each = (time.monotonic() - self.began) / max(1, self.done - self.start)
        return timedelta(seconds=round(each * max(0, (self.total or 0) - self.done)))

    def say(self, line: str) -> None:
        """Log a line on the main process."""
        self.spoke = time.monotonic()
        if is_main():
            logger.info("%s", line)


class ProgressItems(Generic[T]):
    """Items, of which each iteration is shown as a pass."""

    def __init__(
        self,
        items: Iterable[T],
        what: str,
        total: int | None = None,
        *,
        unit: str = "batches",
        quiet: bool = False,
    ) -> None:
        self.items, self.what, self.unit, self.quiet = items, what, unit, quiet
        self.total = len(items) if isinstance(items, Sized) else total

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError(f"the length of {self.items!r} is not known")
        return self.total

    def __iter__(self) -> Iterator[T]:
        with Pass(self.what, self.total, unit=self.unit, quiet=self.quiet) as shown:
            for item in self.items:
                yield item
                shown.advance()


class ProgressBar(Pass):
    """Shows the training steps of a run on the main process, on standard error."""

    def __init__(self, total: int, done: int, unit: str, log_steps: int) -> None:
        """Describe the run.

        Args:
            total: its optimizer steps, of which `done` are over.
            unit: what its throughput counts, such as tokens.
            log_steps: steps between its records.
        """
        super().__init__("training", total, unit="steps", done=done)
        self.counted, self.log_steps = unit, log_steps
        self.last = (0, 0.0)  # tokens and seconds at the last record
        self.loss = self.validation = self.metrics = ""

    def opening(self) -> str:
        """Return the first log line, which says how often there are metrics."""
        every = "every step" if self.log_steps == 1 else f"every {self.log_steps} steps"
        return f"{super().opening()}, metrics {every} (train.log_steps)"

    def advance(self, count: int = 1) -> None:
        """Count steps that are over; those with a record have a line of their own."""
        if (self.done + count) % self.log_steps == 0 or self.done + count == self.total:
            self.spoke = time.monotonic()
        super().advance(count)

    def show(self, record: Mapping[str, float]) -> None:
        """Show a record of the training log: loss, learning rate, throughput."""
        tokens, seconds = self.last
        # 1e-9: no division by zero for records of the same moment
        speed = (record["tokens"] - tokens) / max(1e-9, record["seconds"] - seconds)
        self.last = record["tokens"], record["seconds"]
        self.loss = f"loss {record['loss']:.4f}"
        self.metrics = f"  lr {record['lr']:.2e}  {speed:,.0f} {self.counted}/s"
        if "aux_loss" in record:
            self.metrics += f"  aux loss {record['aux_loss']:.4f}"
        self.update()
        if self.display is None:
            figures = self.loss + self.metrics
            self.say(f"step {record['step']}/{self.total}  {figures}  {self.left()} left")

    def show_validation(self, metric: str, value: float) -> None:
        """Show a score on the validation examples next to the loss."""
        self.validation = f"  val. {metric} {value:.3f}"
        self.update()

    def update(self) -> None:
        """Write the latest figures next to the bar, the most important ones first."""
        self.note = self.loss + self.validation + self.metrics
        self.advance(0)
