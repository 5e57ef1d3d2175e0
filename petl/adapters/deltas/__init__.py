"""Adapters as material: compress, prune and combine what was learned, at the level of tensors.

A state is a mapping of tensor names to tensors, as in an adapter's file; a delta is a state that is
added to another one.
"""

from petl.adapters.deltas.adapters import compress_adapter, expand, prune_adapter
from petl.adapters.deltas.combine import combine
from petl.adapters.deltas.compress import compress
from petl.adapters.deltas.narrow import narrow_folder
from petl.adapters.deltas.prune import (
    QResult,
    analytic_q,
    apply,
    closed_q,
    extract,
    find_q,
    output_moments,
    prune,
    spread_q,
)
from petl.adapters.deltas.updates import combine_adapters
from petl.ops.ternary import Ternary

__all__ = [
    "QResult",
    "Ternary",
    "analytic_q",
    "apply",
    "closed_q",
    "combine",
    "combine_adapters",
    "compress",
    "compress_adapter",
    "expand",
    "extract",
    "find_q",
    "narrow_folder",
    "output_moments",
    "prune",
    "prune_adapter",
    "spread_q",
]
