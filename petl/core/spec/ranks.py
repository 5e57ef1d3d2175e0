"""Ranks against the shapes of the layers: what a layer cannot use is warned about, or refused."""

import logging
from collections.abc import Mapping
from typing import Any

from petl.core.compat import get_pattern_key
from petl.errors import InputError

logger = logging.getLogger(__name__)

# Parameters of an adapter per weight of its layers; assumption: above it, a slip of the keyboard.
MAX_EXCESS = 100


def check_rank(
    config: Any, name: str, shapes: Mapping[str, tuple[int, int]], *, linear: bool = True
) -> None:
    """Warn about ranks that layers cannot use, and raise for an adapter far larger than they are.

    An update of rank R has R (I + O) parameters, and no layer can use R above min(I, O).

    Args:
        config: of any method.
        name: its field for the rank; one that is absent or null is not checked.
        shapes: both widths of each layer, by module path.
        linear: False for a bottleneck with a non-linearity, which may be wider than the layer.

    Raises:
        InputError: the adapter would have over `MAX_EXCESS` times the parameters of its layers.
    """
    default, pattern = getattr(config, name, None), getattr(config, "rank_pattern", None) or {}
    if default is None:
        return
    ranks = {key: pattern.get(get_pattern_key(list(pattern), key), default) for key in shapes}
    unusable = [key for key, shape in shapes.items() if ranks[key] > min(shape)]
    if not unusable:
        return
    key = max(unusable, key=lambda key: ranks[key] / min(shapes[key]))
    what = f"{name}={ranks[key]} is above {min(shapes[key])}, the smaller width of {key}"
    size = sum(rank * sum(shapes[key]) for key, rank in ranks.items())
    excess = size / sum(a * b for a, b in shapes.values())
    if excess > MAX_EXCESS:
        raise InputError(
            f"{what}: the adapter would have {size:,} parameters, {excess:.0f} times as many as "
            f"the layers that it adapts; use a smaller {name}"
        )
    if linear:
        others = f", and {len(unusable) - 1} more layers are as narrow" if unusable[1:] else ""
        logger.warning("%s, which is the highest rank that its update can have%s", what, others)
