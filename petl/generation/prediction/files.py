"""Predict the rows of files, and write them with the predictions."""

import logging
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from petl.adapters.export.saved_adapter import SavedAdapter
from petl.data.inputs import read_inputs
from petl.data.tasks.base import Row, Task
from petl.errors import InputError, printable
from petl.generation.prediction.columns import data_settings
from petl.generation.prediction.predictor import Predictor, predicted
from petl.generation.prediction.tables import (
    JsonLines,
    RowWriter,
    check_format,
    keep_inputs,
    new_table,
    reported,
)
from petl.system.files.paths import path_of
from petl.system.progress import Pass, ProgressItems

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionFile:
    """Where predictions go.

    Attributes:
        file: None: standard output, as JSON lines.
        prefix: of the names of the columns with predictions.
    """

    file: Path | None = None
    prefix: str = ""

    def check(self, names: Sequence[str]) -> None:
        """Raise InputError if the file cannot be written, or is one of the inputs."""
        if self.file is None:
            return
        check_format(self.file)
        keep_inputs(self.file, names)

    @contextmanager
    def opened(self, names: Sequence[str], task: Task) -> Generator[RowWriter]:
        """The writer of the output.

        Args:
            names: of the inputs.
            task: whose predictions are written.
        """
        if self.file is None:
            yield JsonLines(sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        schema = schema_of(names)
        for name in task.varied:  # a struct would have the keys of the first rows
            kind = pa.map_(pa.string(), pa.float64())
            schema = (schema or pa.schema([])).append(pa.field(f"{self.prefix}{name}", kind))
        with new_table(self.file, schema) as writer:
            yield writer

    def reported(self) -> AbstractContextManager[None]:
        """Inside the block, turn an error of writing the file into a RunStopped."""
        # a pipe whose reader has ended is no error
        return nullcontext() if self.file is None else reported(self.file)

    def named(self, raw: Row, prediction: Row) -> Row:
        """A row with its prediction in columns of their own.

        Raises:
            InputError: the row has a column of that name.
        """
        columns = {f"{self.prefix}{name}": value for name, value in prediction.items()}
        taken = next((name for name in columns if name in raw), None)
        if taken is not None:
            raise InputError(
                f"the input has a column {taken!r} already: choose other names for the "
                "predictions with --prefix NAME_"
            )
        return {**raw, **columns}


def predict_files(
    saved: SavedAdapter,
    names: Sequence[str],
    output: PredictionFile,
    settings: Sequence[str] = (),
    *,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
) -> int:
    """Predict the rows of files, write them in their order, and return their number.

    All rows are checked before the model is loaded. Then they are read again, predicted and written
    window by window: files may be larger than memory.

    Args:
        settings: of columns, such as "data.text=review", in place of those of the run.

    Raises:
        InputError: a file, row or setting is wrong, or the task of the adapter is unknown.
    """
    output.check(names)
    task = saved.saved_task
    columns = data_settings(saved.columns, task, settings, labels=False)
    listed = printable(", ".join(names))
    checked = ProgressItems(
        read_inputs(names, task, columns), f"reading {listed}", unit="rows", quiet=True
    )
    total = sum(1 for _ in checked)
    predictor = Predictor.of(saved, batch_size, max_new_tokens)
    is_main = predictor.accelerator.is_main_process
    shown = Pass(f"predicting {listed}", total, unit="rows", prints=output.file is None)
    # the main process writes the rows of all
    with shown, output.opened(names, task) if is_main else nullcontext() as writer:
        rows = read_inputs(names, task, columns)
        for window in predicted(predictor, rows, shown.advance, rows.locate):
            if writer is not None:
                named = [output.named(raw, found) for raw, found in window]
                with output.reported():
                    writer.write(named)
    seconds = max(time.monotonic() - shown.began, 1e-9)
    logger.info("predicted all %s rows, %.3g rows/s", f"{shown.done:,}", shown.done / seconds)
    return shown.done


def schema_of(names: Sequence[str]) -> pa.Schema | None:
    """The types of the columns of an input in parquet; None for other formats, or several files."""
    if len(names) != 1 or not names[0].lower().endswith(".parquet"):
        return None
    # without the metadata of pandas, which describes the columns of the input only
    return pq.read_schema(path_of("FILE", names[0])).remove_metadata()
