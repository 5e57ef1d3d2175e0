"""Imports with hardly any garbage collections, which otherwise take a fifth of their time.

Each full collection visits all objects, and the modules of torch and transformers are two million
that stay. For entry points only: how often a user's program collects is not petl's to decide.
"""

import atexit
import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager

# container objects between two collections; Python's own number is 700. Assumption: a few megabytes
# of garbage; measured: imports take the time that they take without a collector.
RARE = 50_000


@contextmanager
def rare_collections() -> Generator[None]:
    """Collect garbage rarely in the block; later collections leave out what it has made."""
    before = gc.get_threshold()
    gc.set_threshold(RARE, *before[1:])
    try:
        yield
    finally:
        freeze_until_exit()
        gc.set_threshold(*before)


def freeze_until_exit() -> None:
    """Leave what exists now out of all collections, except the interpreter's last one.

    The extension of triton, once imported, prints every function of it that the last collection
    does not find.
    """
    gc.freeze()
    atexit.register(_unfreeze)


def _unfreeze() -> None:
    if "triton" in sys.modules:  # alone: visiting all objects takes about a second
        gc.unfreeze()
