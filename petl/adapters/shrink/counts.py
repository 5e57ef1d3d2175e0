"""How many channels, or groups of heads, stay."""

import math
from collections.abc import Mapping

from petl.core.spec.config import require
from petl.training.ranks import keep_ratios


def even_count(width: int, sparsity: float, multiple: int) -> int:
    """Return the multiple nearest to (1 - sparsity) width; at least one, ties upwards."""
    return multiple * max(1, math.floor((1 - sparsity) * width / multiple + 0.5))


def even_counts(widths: Mapping[str, int], sparsity: float, multiple: int) -> dict[str, int]:
    """Return `even_count` of each block, by path.

    Raises:
        InputError: that would leave a block as it is.
    """
    counts = {path: even_count(width, sparsity, multiple) for path, width in widths.items()}
    for path, width in widths.items():
        require(
            counts[path] < width,
            f"sparsity={sparsity} leaves {counts[path]} of the {width} channels of {path}, which "
            f"are multiples of multiple={multiple}: nothing to prune; raise sparsity, or lower "
            "multiple",
        )
    return counts


def counts_by_block(
    widths: Mapping[str, int], importance: Mapping[str, float], sparsity: float, multiple: int
) -> dict[str, int]:
    """Return multiples in proportion to the `keep_ratios` of the blocks, by path.

    Each is at least one multiple and at most the width. Their sum is the multiple nearest to
    (1 - sparsity) times the sum of the widths that these bounds allow.

    Args:
        widths: channels of each block.
        importance: of each block.

    Raises:
        InputError: a block has less than one multiple, or nothing would be pruned.
    """
    ratios = keep_ratios({path: importance[path] for path in widths}, sparsity)
    # blocks of unequal widths: the mean of the ratios is that of no channels
    goal = (1 - sparsity) * sum(widths.values())
    scale = goal / sum(ratios[path] * width for path, width in widths.items()) / multiple
    real = {path: scale * ratios[path] * width for path, width in widths.items()}
    most = {path: width // multiple for path, width in widths.items()}
    # none could keep a multiple
    narrow = next((path for path in most if not most[path]), "")
    require(
        not narrow,
        f"{narrow} has {widths.get(narrow)} channels, fewer than multiple={multiple}; lower it",
    )
    counts = {path: min(most[path], max(1, math.floor(r))) for path, r in real.items()}
    total = math.floor(goal / multiple + 0.5)
    total = min(sum(most.values()), max(len(most), total))
    # one by one to (or from) where the real number is farthest; more important blocks keep more
    while left := total - sum(counts.values()):
        step = 1 if left > 0 else -1
        free = [path for path in counts if 1 <= counts[path] + step <= most[path]]
        path = max(free, key=lambda p: (step * (real[p] - counts[p]), step * importance[p]))
        counts[path] += step
    require(
        total * multiple < sum(widths.values()),
        f"sparsity={sparsity} prunes nothing at multiple={multiple}; raise sparsity, or lower "
        "multiple",
    )
    return {path: multiple * count for path, count in counts.items()}


def group_count(groups: int, sparsity: float) -> int:
    """Return how many of the groups of heads stay: rounded down, at least one."""
    return max(1, math.floor((1 - sparsity) * groups + 1e-9))  # 1 - 0.9 is below 0.1
