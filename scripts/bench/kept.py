"""Results that are files: what has been measured is not measured again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json

Content = dict[str, Any]


def kept(file: Path) -> Content | None:
    """Return the content of a file of results, or None if it is not there."""
    return read_json(file, Content) if file.is_file() else None


def keep(file: Path, measure: Callable[[], Content]) -> Content:
    """Return the content of a file of results; if it is not there, measure and write it."""
    known = kept(file)
    if known is None:
        known = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, as_json(known))
    return known
