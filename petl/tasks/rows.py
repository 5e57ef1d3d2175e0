"""Encoded rows: types, constants, and padding.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label that transformers' losses skip

UNTRUNCATED = 2**30  # a max_length in tokens that no row reaches

NON_INPUT_PREFIX = "_"  # begins the names of encoded columns that are not model inputs

Row = dict[str, Any]

# of a conversation: `role`, `content`, and `more`, the JSON text of what only some messages have
Message = dict[str, Any]
TOOLS = "(tools)"  # role of a first message whose content are the functions, as JSON text

Columns = dict[str, list[Any]]
Prediction = dict[str, Any]  # JSON values by name


def source_numbers(rows: Columns, kept: Iterable[int]) -> Columns:
    """The column `_number` of encoded rows: the `number` of the row that each was made of.

    It is absent if the rows have none.

    Args:
        kept: the position in `rows` of the row that each encoded row was made of.
    """
    return {"_number": [rows["number"][i] for i in kept]} if "number" in rows else {}


@dataclass(frozen=True)
class Pad:
    """Pads rows on the right to the longest of the batch, rounded up to `multiple` tokens."""

    pad_id: int
    multiple: int = 1

    def stack(self, rows: Sequence[Row], key: str, fill: int) -> Tensor:
        """Stack one column of the rows with padding, [B, T] int64."""
        # rounded up to a multiple
        longest = max(len(row[key]) for row in rows)
        length = -(-longest // self.multiple) * self.multiple
        stacked = torch.full((len(rows), length), fill, dtype=torch.long)
        for i, row in enumerate(rows):
            stacked[i, : len(row[key])] = torch.as_tensor(row[key], dtype=torch.long)
        return stacked

    def inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, if rows have them, `token_type_ids`, [B, T] each."""
        fills = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0}
        return {key: self.stack(rows, key, fill) for key, fill in fills.items() if key in rows[0]}
