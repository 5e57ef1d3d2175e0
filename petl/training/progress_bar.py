"""How training looks while it runs: a progress bar in a terminal, else a line now and then."""

import logging
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class ProgressBar:
    """The progress of a run on its main process, on standard error."""

    def __init__(self, accelerator: Accelerator, total: int, done: int, unit: str) -> None:
        self.total, self.shown, self.unit = total, (0, 0.0), unit
        console = Console(stderr=True)
        self.is_main = accelerator.is_main_process
        self.bar: Progress | None = None
        if self.is_main and console.is_terminal:
            self.bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("", total=total, completed=done, figures="")

    def __enter__(self) -> "ProgressBar":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self) -> None:
        if self.bar:
            self.bar.advance(self.task)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a record of the training log: loss, rate, speed."""
        amount, seconds = self.shown
        speed = (record["tokens"] - amount) / max(1e-9, record["seconds"] - seconds)
        self.shown = record["tokens"], record["seconds"]
        figures = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed:,.0f} {self.unit}/s"
        if "aux_loss" in record:
            figures += f"  aux {record['aux_loss']:.4f}"
        if self.bar:
            self.bar.update(self.task, figures=figures)
        elif self.is_main:
            logger.info("step %d/%d  %s", record["step"], self.total, figures)
