"""The cache folder for converted models and encoded rows."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder: `$PETL_CACHE`, or `~/.cache/petl`."""
    return Path(os.environ.get("PETL_CACHE") or "~/.cache/petl").expanduser()
