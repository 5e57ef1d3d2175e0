"""The interface of trackers, and the tracker that records nothing."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from petl.core.types import Groups, Record
from petl.errors import first_line

if TYPE_CHECKING:  # an optional package
    from pandas import DataFrame

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackerTable:
    """A table for a tracker; cells are numbers and texts."""

    columns: list[str]
    rows: Sequence[Sequence[object]]

    def by_column(self) -> dict[str, list[object]]:
        """The values of each column."""
        return {name: [row[i] for row in self.rows] for i, name in enumerate(self.columns)}

    def frame(self) -> "DataFrame":
        """The table as a DataFrame of pandas."""
        import pandas as pd  # optional: some of the trackers need it

        return pd.DataFrame(self.rows, columns=self.columns)

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(in_cell, line))} |" for line in lines)


def in_cell(value: object) -> str:
    """A value as it is written in a cell of a table in Markdown."""
    # one line a cell; | would end the cell, and < begin HTML
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


@dataclass(frozen=True)
class TrackerConfig:
    """The settings of a tracker; configs/tracker/ describes them."""

    name: str

    def tracker(self) -> "Tracker | None":
        """Return a tracker with these settings; None for `tracker=none`."""
        return None


class Tracker:
    """Record the metrics of a run, in its main process; this base class records nothing.

    A run calls `begin`, then `rewind` if it resumes from a checkpoint, then `log` repeatedly, and
    finally `end`, or `fail` if training stopped early.

    Attributes:
        lost: True once the service has failed: the run goes on, and its folder has all that the
            service did not get.
    """

    name: str  # as in the settings
    folder: Path
    lost = False

    def begin(self, run: Path, config: Groups) -> None:
        """Start or resume recording the run in this folder.

        Args:
            run: the folder of the run.
            config: its resolved configuration.
        """

    def rewind(self, records: Sequence[Record]) -> None:
        """Resume from a checkpoint; `records` were logged before it, in this order."""

    def log(self, record: Record) -> None:
        """Record a line of metrics.jsonl."""

    def end(
        self,
        scores: Record,
        plots: Sequence[Path],
        adapter: Path,
        tables: Mapping[str, TrackerTable],
    ) -> None:
        """Record the results of a finished run.

        Args:
            scores: numbers and texts by name.
            plots: PNG files.
            adapter: the folder of the adapter.
            tables: predictions and what is counted of them, by name.
        """

    def fail(self) -> None:
        """Close the record of a run whose training stopped early."""

    def closing(self) -> str:
        """A line for the end of a run's output that says where to view the record; "" for none."""
        return ""

    def _send(self, action: Callable[[], object]) -> None:
        if self.lost:  # each further call might wait for a timeout
            return
        try:
            action()
        except Exception as error:  # a run must not end since its tracker does
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.lost = True
        logger.warning(
            "tracker=%s failed (%s) and gets nothing more; the run goes on, and %s has it all",
            self.name,
            reason(error),
            self.folder,
        )


def reason(error: Exception) -> str:
    """The first line of an error's message; its class if it has none."""
    return first_line(error) or type(error).__name__


def named(record: Record, group: str = "") -> Record:
    """Flatten a record to names with a group; values outside of any group get the prefix `group`.

    >>> named({"loss": 0.5, "validation": {"accuracy": 0.9}}, "train/")
    {'train/loss': 0.5, 'validation/accuracy': 0.9}
    """
    names = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            names |= {f"{key}/{inner_key}": inner for inner_key, inner in value.items()}
        else:
            names[f"{group}{key}"] = value
    # None: not measured at this step
    return {name: value for name, value in names.items() if value is not None}


def metrics_of(record: Record) -> dict[str, float]:
    """The metrics in a line of metrics.jsonl by name, without its step."""
    # trackers take the step as an argument
    return named({key: value for key, value in record.items() if key != "step"}, "train/")
