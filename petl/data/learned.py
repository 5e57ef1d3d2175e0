"""Text of which some tokens have a loss: that of an encoded row, in parts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

BRACKETS = "⟦", "⟧"  # around tokens with loss, outside a terminal


@dataclass(frozen=True)
class PreviewSpan:
    """Text of adjacent tokens; `has_loss` is True if the loss is computed on them."""

    text: str
    has_loss: bool


def pieces(tokenizer: Any, ids: list[int], marks: list[bool]) -> Iterator[PreviewSpan]:
    """Yield adjacent tokens with the same mark as text, including special tokens."""
    # decoding runs, not single tokens: a character may span several tokens
    for has_loss, run in groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1]):
        # special tokens stay visible: a missing end token is a frequent mistake
        yield PreviewSpan(tokenizer.decode([token for token, _ in run]), has_loss)
