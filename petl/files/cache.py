"""The folder of converted models and encoded rows."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where petl keeps what it makes once: `$PETL_CACHE`, or `~/.cache/petl`."""
    return Path(os.environ.get("PETL_CACHE") or "~/.cache/petl").expanduser()
