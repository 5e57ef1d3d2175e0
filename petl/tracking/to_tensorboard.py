"""Figures, pictures and the configuration as TensorBoard reads them, in the folder of the run."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petl.tracking.base import Tracker, TrackerConfig, figures

EVENTS = "tensorboard"  # the folder in that of the run
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorboardConfig(TrackerConfig):
    """TensorBoard has no settings: it shows what is below the folder that it is given."""


class TensorboardTracker(Tracker):
    """Writes event files."""

    def begin(self, run: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.step = run / EVENTS, 0
        self.writer = self._open()
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")
        self.look = f"to look at the run: tensorboard --logdir {run}"
        logger.info("%s", self.look)

    def _open(self, **options: Any) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder, **options)

    def rewind(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.step = records[-1]["step"] if records else 0
        self.writer.close()
        self.writer = self._open(purge_step=self.step + 1)  # what a killed run logged after it

    def log(self, record: Mapping[str, Any]) -> None:
        self.step = record["step"]
        for name, value in figures(record).items():
            self.writer.add_scalar(name, value, self.step)

    def end(self, scores: Mapping[str, Any], pictures: Sequence[Path], adapter: Path) -> None:
        for name, value in scores.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, self.step)
        for path in pictures:
            self.writer.add_image(path.stem, pixels(path), self.step, dataformats="HWC")
        self.writer.close()

    def fail(self) -> None:
        self.writer.close()

    def closing(self) -> str:
        return self.look


def pixels(picture: Path) -> Any:
    """A PNG file as an array of bytes, [height, width, 3]."""
    import numpy as np
    from PIL import Image  # there since matplotlib, which drew the picture, needs it

    with Image.open(picture) as opened:
        return np.asarray(opened.convert("RGB"))
