"""The progress of training: a bar with loss and validation score, else a line at each log step."""

from collections.abc import Mapping
from typing import Any

from petl.core.progress import Pass


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

    def show(self, record: Mapping[str, Any]) -> None:
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
