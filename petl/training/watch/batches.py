"""The rows of a batch as the model reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from petl.data.tasks.base import IGNORED


@dataclass(frozen=True)
class Row:
    """An encoded row without its padding.

    Attributes:
        ids: tokens that the model reads.
        labels: one for each of `ids`; of an encoder-decoder model, those of the output; of a
            classifier, one. None for a loss without labels.
    """

    ids: list[int]
    labels: list[int] | None

    @property
    def target(self) -> list[int]:
        """What the model learns to write."""
        return [label for label in self.labels or () if label != IGNORED]


def rows_of(batch: object) -> list[Row]:
    """Return the rows of a batch, or of one row; of anything but encoded text, none."""
    if not isinstance(batch, Mapping) or not len(batch.get("input_ids", ())):
        return []
    given, masks = _list(batch["input_ids"]), _list(batch.get("attention_mask"))
    labels = _list(batch.get("labels"))
    if not isinstance(given[0], list):
        given, masks, labels = [given], masks and [masks], [labels]
    if isinstance(given[0][0] if given[0] else 0, list):
        return []  # choices, or images
    rows = []
    for number, ids in enumerate(given):
        own = labels[number] if labels and number < len(labels) else None
        mask = masks[number] if masks else None
        if isinstance(mask, list) and len(mask) == len(ids) and not isinstance(mask[0], list):
            if isinstance(own, list) and len(own) == len(ids):
                own = [label for label, present in zip(own, mask, strict=True) if present]
            ids = [token for token, present in zip(ids, mask, strict=True) if present]
        rows.append(Row(ids, own if isinstance(own, list | None) else [own]))
    return rows


def _list(value: object) -> Any:
    if isinstance(value, list | tuple):
        return [_list(each) for each in value]
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value
