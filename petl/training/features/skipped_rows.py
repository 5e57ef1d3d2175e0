"""Rows that cannot be used, with `data.bad_rows=skip`: counted, and written beside the scores."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from petl.core.types import Record
from petl.data.validation import FaultyRow
from petl.system.collectives import on_main
from petl.system.files.disk import atomic_file, stop_when_full
from petl.training.features import Context, RunFeature
from petl.training.features.section import Section

FILE = "skipped.jsonl"


class SkippedRows(RunFeature):
    """Says how many rows of the data a run has left out, and why."""

    key: ClassVar[str] = "skipped_rows"

    def before_training(self, context: Context) -> None:
        """Write the rows, and add their numbers to the scores."""
        run, skipped = context.run, context.splits.skipped
        counts = {split: len(rows) for split, rows in skipped.items() if rows}
        if counts and self.key not in run.scores:
            on_main(run.accelerator, lambda: write(run.path, skipped))
            run.scores.add({self.key: counts})

    @classmethod
    def section(cls, folder: Path, scores: Record) -> Section | None:
        """Return the counts, if rows were left out."""
        counts: Mapping[str, int] = scores.get(cls.key) or {}
        if not counts:
            return None
        named = " and ".join(f"{count:,} {split}" for split, count in counts.items())
        return Section(
            "Rows that were left out",
            f"{named} rows cannot be used, and data.bad_rows=skip leaves them out; {FILE} in the "
            "run's folder has each of them with its line and the reason.",
            line=f"left out: {named} rows that cannot be used, see {folder / FILE}",
        )


def write(folder: Path, skipped: Mapping[str, Sequence[FaultyRow]]) -> None:
    """Write the rows as JSON lines: `split`, `place`, `reason`, and `row` if it could be read."""
    with stop_when_full(folder), atomic_file(folder / FILE) as opened:
        for split, rows in skipped.items():
            for row in rows:
                line = {"split": split, "place": row.place, "reason": row.reason, "row": row.values}
                text = json.dumps(line, ensure_ascii=False, default=str)
                opened.write(f"{text}\n".encode())
