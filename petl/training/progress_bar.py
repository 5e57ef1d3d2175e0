"""The progress of training: a bar in a terminal, else a log line at each log step."""

import logging
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)


class ProgressBar:
    """Shows the training steps of a run on the main process, on standard error."""

    def __init__(self, accelerator: Accelerator, total: int, done: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self.last = (0, 0.0)  # tokens and seconds at the last record
        console = Console(stderr=True)
        self.is_main = accelerator.is_main_process
        self.bar: Progress | None = None
        if self.is_main and console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TextColumn("remaining"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("", total=total, completed=done, metrics="")

    def __enter__(self) -> "ProgressBar":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self) -> None:
        """Count a step."""
        if self.bar:
            self.bar.advance(self.task)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a record of the training log: loss, learning rate, throughput."""
        tokens, seconds = self.last
        # 1e-9: no division by zero for records of the same moment
        speed = (record["tokens"] - tokens) / max(1e-9, record["seconds"] - seconds)
        self.last = record["tokens"], record["seconds"]
        metrics = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed:,.0f} {self.unit}/s"
        if "aux_loss" in record:
            metrics += f"  aux loss {record['aux_loss']:.4f}"
        if self.bar:
            self.bar.update(self.task, metrics=metrics)
        elif self.is_main:
            logger.info("step %d/%d  %s", record["step"], self.total, metrics)
