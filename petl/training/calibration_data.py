"""Settings of calibration data, and batches of some of its rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from petl.data.batch_sampler import chunks, permutation
from petl.errors import InputError
from petl.training.dataloader import Batch, Collate


@dataclass(kw_only=True)
class CalibrationData:
    """The settings under `method.calibration_data`, or of the data under `ranks`."""

    data: dict[str, Any] | None = None  # settings as under `data`; None: the run's training rows
    num_samples: int = 256
    seq_len: int = 2048  # maximum tokens of a sample; longer rows are truncated
    batch_size: int = 1  # samples per forward pass
    seed: int = 233  # of the choice of rows

    def check(self, group: str) -> None:
        """Raise InputError for a value below the minimum of its setting under `group`."""
        for name, least in (("num_samples", 1), ("seq_len", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{group}.{name}={value} is below {least}, the minimum")


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

    def cut(self, row: dict[str, Any]) -> dict[str, Any]:
        """Truncate the token columns of a row to `seq_len`."""
        length = self.settings.seq_len
        return {k: v[:length] if isinstance(v, list) else v for k, v in row.items()}
