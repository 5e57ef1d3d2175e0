"""The interface of trackers, and the tracker that records nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table for a tracker; cells are numbers and texts."""

    columns: list[str]
    rows: list[list[Any]]

    def by_column(self) -> dict[str, list[Any]]:
        """The values of each column."""
        return {name: [row[i] for row in self.rows] for i, name in enumerate(self.columns)}

    def frame(self) -> Any:
        """The table as a DataFrame of pandas."""
        import pandas as pd  # optional: some of the trackers need it

        return pd.DataFrame(self.rows, columns=self.columns)

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(in_cell, line))} |" for line in lines)


def in_cell(value: Any) -> str:
    """A value as it is written in a cell of a table in Markdown."""
    # one line a cell; | would end the cell, and < begin HTML
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


@dataclass(frozen=True)
class TrackerConfig:
    """The settings of a tracker; configs/tracker/ describes them."""

    name: str


class Tracker:
    """Record the metrics of a run, in its main process; this base class records nothing.

    A run calls `begin`, then `rewind` if it resumes from a checkpoint, then `log` repeatedly, and
    finally `end`, or `fail` if training stopped early.
    """

    def begin(self, run: Path, config: Mapping[str, Any]) -> None:
        """Start or resume recording the run in this folder.

        Args:
            run: the folder of the run.
            config: its resolved configuration.
        """

    def rewind(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Resume from a checkpoint; `records` were logged before it, in this order."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Record a line of metrics.jsonl."""

    def end(
        self,
        scores: Mapping[str, Any],
        plots: Sequence[Path],
        adapter: Path,
        tables: Mapping[str, Table],
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


def named(record: Mapping[str, Any], group: str = "") -> dict[str, Any]:
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


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in a line of metrics.jsonl by name, without its step."""
    # trackers take the step as an argument
    return named({key: value for key, value in record.items() if key != "step"}, "train/")
