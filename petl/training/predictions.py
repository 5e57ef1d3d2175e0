"""Predictions of the rows of an evaluation: kept during the pass that scores them, and written.

A line of the file is one row of the data: its number (`row`), the columns that the task shows, the
label and what the model predicts. The lines are in the order of the data.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from petl.core.distributed import gathered
from petl.files.disk import atomic_file, stop_when_full
from petl.tasks.base import Task
from petl.tasks.rows import NON_INPUT_PREFIX, Prediction, Row


class Predictions:
    """Collects the predictions of a process; they stay on the device until they are gathered.

    Attributes:
        answers: generated answers with their scores, by the position of the encoded row.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[list[int], Tensor]] = []
        self.answers: dict[int, Prediction] = {}

    def add(self, positions: list[int], values: Tensor) -> None:
        """Keep the result of `Task.predict` for the rows at these positions."""
        self.parts.append((positions, values))

    def gathered(self) -> tuple[dict[int, np.ndarray], dict[int, Prediction]]:
        """The values and the answers of all processes, by position; all of them must call it."""
        own = {
            position: value
            for positions, values in self.parts
            for position, value in zip(positions, values.cpu().numpy(), strict=True)
        }
        # processes may have computed a row twice, to stay in step
        values, answers = {}, {}
        for one, other in gathered((own, self.answers)):
            values |= one
            answers |= other
        return values, answers

    def write(
        self, file: Path, task: Task, rows: Dataset, sources: Dataset, accelerator: Accelerator
    ) -> None:
        """Write the predictions of all processes to a file (main process only); all must call it.

        Args:
            rows: the encoded rows.
            sources: the rows that they were made of.
        """
        values, answers = self.gathered()
        # after the gather, in which all processes take part
        if not accelerator.is_main_process:
            return
        described = describe(task, values, rows)
        for position, answer in answers.items():
            number = numbers_of(rows, [position])[0]
            # a generated answer comes on top of what the forward pass predicts
            described[number] = described.get(number, {}) | answer
        shown = sources.select_columns([name for name in task.shown if name in sources.features])
        with stop_when_full(file.parent), atomic_file(file) as opened:
            for number, found in sorted(described.items()):
                # a data set without columns has no rows to index
                source = shown[number] if shown.column_names else {}
                line = json.dumps({"row": number, **source, **found}, ensure_ascii=False)
                opened.write(f"{line}\n".encode())


def describe(task: Task, values: dict[int, np.ndarray], rows: Dataset) -> dict[int, Prediction]:
    """The prediction of each source row, by number, from the values of encoded rows by position."""
    if task.packs or not values:
        return {}  # a packed row has parts of several
    positions = sorted(values)
    return dict(
        task.described((values[i] for i in positions), described_rows(rows.select(positions)))
    )


def described_rows(rows: Dataset) -> Iterator[Row]:
    """Yield the columns of encoded rows that `Task.described` reads, and always `_number`."""
    names = [n for n in rows.column_names if n.startswith(NON_INPUT_PREFIX) or n == "labels"]
    kept = rows.select_columns(names) if names else ({} for _ in range(len(rows)))
    for number, row in enumerate(kept):
        yield {"_number": number, **row}


def numbers_of(rows: Dataset, positions: Iterable[int]) -> list[int]:
    """The numbers of the source rows of encoded rows; their positions if none was dropped."""
    if "_number" not in rows.column_names:
        return list(positions)
    return [rows[position]["_number"] for position in positions]
