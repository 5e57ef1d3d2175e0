"""TensorBoard event files with metrics, plots and configuration, in the folder of the run."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from petl.core.types import Groups, Record
from petl.training.tracking.base import Tracker, TrackerConfig, TrackerTable, metrics_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS = "tensorboard"  # subfolder of the run
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorboardConfig(TrackerConfig):
    """TensorBoard has no settings: it shows all event files below a folder."""

    def tracker(self) -> Tracker:
        """Return the tracker that writes event files."""
        return TensorboardTracker()


class TensorboardTracker(Tracker):
    """Write event files."""

    def begin(self, run: Path, config: Groups) -> None:
        """Open an event file and write the configuration."""
        self.folder, self.step = run / EVENTS, 0
        self.writer = self._open()
        # texts are shown as Markdown: the fence keeps the indentation
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")
        self.view_command = f"to view the run: tensorboard --logdir {run}"
        logger.info("%s", self.view_command)

    def _open(self, purge_step: int | None = None) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder, purge_step=purge_step)

    def rewind(self, records: Sequence[Record]) -> None:
        """Continue after the last record; hide later events."""
        self.step = records[-1]["step"] if records else 0
        self.writer.close()  # purge_step takes effect in a new event file
        # hides what an interrupted run logged later
        self.writer = self._open(self.step + 1)

    def log(self, record: Record) -> None:
        """Write the metrics of a step."""
        self.step = record["step"]
        for name, value in metrics_of(record).items():
            self.writer.add_scalar(name, value, self.step)

    def end(
        self,
        scores: Record,
        plots: Sequence[Path],
        adapter: Path,
        tables: Mapping[str, TrackerTable],
    ) -> None:
        """Write the scores, plots and tables."""
        for name, value in scores.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, self.step)
        for path in plots:
            self.writer.add_image(path.stem, pixels(path), self.step, dataformats="HWC")
        for name, table in tables.items():
            self.writer.add_text(name, table.markdown(), self.step)
        self.writer.close()

    def fail(self) -> None:
        """Close the event file."""
        self.writer.close()

    def closing(self) -> str:
        """The command that shows the run."""
        return self.view_command


def pixels(plot: Path) -> np.ndarray:
    """Read a PNG file as an array of bytes, [height, width, 3]."""
    from PIL import Image  # installed, since matplotlib, which drew the plot, needs it

    with Image.open(plot) as opened:
        return np.asarray(opened.convert("RGB"))
