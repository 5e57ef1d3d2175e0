"""Imports with hardly any garbage collections, which otherwise take a fifth of their time.

Each full collection visits all objects, and the modules of torch and transformers are two million
that stay. For entry points only: how often a user's program collects is not petl's to decide.
"""

import gc
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
        gc.freeze()
        gc.set_threshold(*before)
