"""What a run tells a tracker, and the tracker that keeps nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrackerConfig:
    """The settings of a tracker; what each means stands in configs/tracker/."""

    name: str


class Tracker:
    """Takes what a run finds out, in its main process; this one lets it go.

    A run calls `begin`, then `rewind` if it goes on from a checkpoint, then `log` and, at last,
    `end`, or `fail` if training stopped before.
    """

    def begin(self, run: Path, config: Mapping[str, Any]) -> None:
        """The run in this folder begins or goes on; `config` is its resolved configuration."""

    def rewind(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Training goes on from a checkpoint; `records` were logged up to it, in this order."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl."""

    def end(self, scores: Mapping[str, Any], pictures: Sequence[Path], adapter: Path) -> None:
        """Take what a finished run is about: numbers and texts by name, PNG files, the adapter."""

    def fail(self) -> None:
        """Training has stopped early."""

    def closing(self) -> str:
        """Where to look at a run that is over, as one of its closing lines; "" for nowhere."""
        return ""


def named(record: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """The values of a record by the names that trackers show; those in no group go into `group`.

    >>> named({"loss": 0.5, "validation": {"accuracy": 0.9}}, "train/")
    {'train/loss': 0.5, 'validation/accuracy': 0.9}
    """
    names = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            names |= {f"{key}/{inner}": each for inner, each in value.items()}
        else:
            names[f"{group}{key}"] = value
    return {name: value for name, value in names.items() if value is not None}


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name, without its step."""
    return named({key: value for key, value in record.items() if key != "step"}, "train/")
