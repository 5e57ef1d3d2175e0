"""Calibration data: batches for methods that compute initial values from data, such as CorDA.

method.calibration_data.num_samples=256                   of the run's own training rows
+data@method.calibration_data.data=hamlet                 of other data, with its settings
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset

from petl.core.types import Record, Settings
from petl.data.base import Row, as_dataset, read_data
from petl.data.batch_sampler import chunks, permutation
from petl.data.models.loading import load_processor
from petl.data.models.sources import ModelSource
from petl.data.refused_rows import encode_usable
from petl.data.streaming import StreamedRows
from petl.system.values import check_rules, field, integer, read_fields
from petl.training.dataloader import Batch, Collate, Splits

GROUP = "method.calibration_data"


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """The settings under `method.calibration_data`, and among those under `ranks`."""

    data: Record | None = field(None)  # as under `data`; None: the run's training rows
    num_samples: int = field(256, integer(1))
    seq_len: int = field(2048, integer(1))  # maximum tokens of a sample; longer ones are cut
    batch_size: int = field(1, integer(1))  # samples per forward pass
    seed: int = field(233, integer(0))  # of the choice of rows


def read_calibration(given: Settings | None) -> CalibrationData:
    """Return the settings under `method.calibration_data`; None: all defaults.

    Raises:
        InputError: a setting is unknown or out of range.
    """
    settings = read_fields(CalibrationData, given or {}, GROUP)
    check_rules(settings, GROUP)
    return settings


class CalibrationBatches:
    """This process's part of some rows, without the columns `labels`; reiterable."""

    def __init__(
        self,
        rows: Dataset,
        collate: Collate,
        settings: CalibrationData,
        labels: tuple[str, ...] = ("labels",),
    ) -> None:
        # the same rows on any number of processes
        order = permutation(len(rows), settings.seed, 0)[: settings.num_samples]
        state = PartialState()
        self.order = order[state.process_index :: state.num_processes]
        self.rows, self.collate, self.settings, self.labels = rows, collate, settings, labels

    def __iter__(self) -> Iterator[Batch]:
        for numbers in chunks(self.order, self.settings.batch_size):
            batch = self.collate([self.cut(self.rows[number]) for number in numbers])
            yield {name: tensor for name, tensor in batch.items() if name not in self.labels}

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.settings.batch_size)

    def cut(self, row: Row) -> Row:
        """Truncate the token columns of a row to `seq_len`."""
        length = self.settings.seq_len
        return {k: v[:length] if isinstance(v, list) else v for k, v in row.items()}


def calibration_batches(
    settings: CalibrationData, model: ModelSource, splits: Splits
) -> CalibrationBatches:
    """Return the batches that some settings describe.

    Args:
        model: the run's model, for the processor of other data.
        splits: the run's own rows.

    Raises:
        InputError: the other data cannot be read.
    """
    if settings.data is None:
        own = splits.train
        if isinstance(own, StreamedRows):
            own = own.first_rows(settings.num_samples)
        return CalibrationBatches(own, splits.collate, settings, splits.task.label_columns)
    other = read_data(settings.data)
    processor = load_processor(model, other.task)
    _, (rows,) = encode_usable(
        other, processor, lambda data: [as_dataset(data, settings.num_samples)]
    )
    collate = other.task.collate(processor, 1)  # no padding to multiples
    return CalibrationBatches(rows, collate, settings, other.task.label_columns)
