"""Retained texts: those that petl brings, and those of files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from petl.data.files import located_rows
from petl.data.validation import Row
from petl.errors import InputError, did_you_mean, shown
from petl.system.files.read import iterate_json_lines

BUNDLED = "bundled"
FILE = Path(__file__).with_name("texts.jsonl")
COLUMN = "text"


class BundledText(TypedDict):
    """A line of the bundled file."""

    kind: str
    text: str


def read_texts(names: Sequence[str], setting: str) -> list[str]:
    """Return the texts of files with a column `text`, or those that petl brings.

    The bundled texts are of ten kinds, in turn, so that the first ones of them are of all kinds.

    Args:
        names: of files in the formats of `petl.data.files`, or "bundled" alone.
        setting: that names them, for messages.

    Raises:
        InputError: a file cannot be read or has no column `text`, or a value is no text.
    """
    if list(names) == [BUNDLED]:
        return [line["text"] for line in iterate_json_lines(FILE, BundledText)]
    return [_text(row, where) for where, row in located_rows(setting, names, _choose)]


def _choose(present: Iterable[str], origin: str) -> list[str]:
    columns = list(present)
    if COLUMN not in columns:
        raise InputError(
            f"{origin} has no column {COLUMN}{did_you_mean(COLUMN, columns)}: retained texts are "
            f"in a column of that name; there are {', '.join(columns)}"
        )
    return [COLUMN]


def _text(row: Row, where: str) -> str:
    value = row[COLUMN]
    if not isinstance(value, str):
        raise InputError(f"{where}: {COLUMN} is {shown(value)}, not text")
    return value
