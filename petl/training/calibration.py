"""Calibration data: batches for methods that compute initial values from data, such as CorDA.

method.calibration_data.num_samples=256                   of the run's own training rows
+data@method.calibration_data.data=hamlet                 of other data, with its settings
"""

from collections.abc import Mapping
from typing import Any

from petl.data.base import as_dataset, read_data
from petl.data.models.loading import load_processor
from petl.data.models.sources import ModelSource
from petl.data.streaming import StreamedRows
from petl.system.values import read_fields
from petl.training.calibration_data import CalibrationBatches, CalibrationData
from petl.training.dataloader import Splits


def calibration_batches(
    given: Mapping[str, Any] | None,
    model: ModelSource,
    splits: Splits,
    group: str = "method.calibration_data",
) -> CalibrationBatches:
    """Return the batches that `method.calibration_data`, or another group, describes.

    Args:
        given: those settings; None: all defaults.
        model: the run's model, for the processor of other data.
        splits: the run's own rows.
        group: the group of the settings, for messages.

    Raises:
        InputError: a setting is unknown or out of range, or the other data cannot be read.
    """
    settings = read_fields(CalibrationData, given or {}, group)
    settings.check(group)
    if settings.data is None:
        own = splits.train
        if isinstance(own, StreamedRows):
            own = own.first_rows(settings.num_samples)
        return CalibrationBatches(own, splits.collate, settings, splits.task.label_columns)
    other = read_data(settings.data)
    processor = load_processor(model, other.task)
    rows = other.task.encode(processor, as_dataset(other, settings.num_samples))
    collate = other.task.collate(processor, 1)  # no padding to multiples
    return CalibrationBatches(rows, collate, settings, other.task.label_columns)
