"""A plan of paths by levels, as index tensors: a level is drafted in one call, without loops.

Node 0 is the root; nodes are numbered level by level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from petl.efficiency.drafting.tree import Path


class Level(NamedTuple):
    """The nodes of one depth.

    Attributes:
        above: places, in the level before, of the nodes with children, long [number of these].
        rows: for each node its parent's place in `above`, long [nodes].
        ranks: of each node among what follows its parent, long [nodes].
        row_of: place in `above` by place in the level before.
        node_of: place of a node in its level by row and rank.
    """

    above: Tensor
    rows: Tensor
    ranks: Tensor
    row_of: dict[int, int]
    node_of: dict[tuple[int, int], int]


class Levels(list[Level]):
    """Paths of ranks by depth.

    Attributes:
        planned: the paths as they were given.
        paths: level by level, in the order of the nodes.
        parents: of the nodes, long [nodes].
    """

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        """Sort paths by depth.

        Args:
            paths: each with its beginnings.
            device: of the index tensors.
        """
        super().__init__()
        self.planned = list(paths)
        self.paths: list[Path] = []
        parents: list[int] = []
        before: dict[Path, int] = {(): 0}  # places in the level before
        first = 0  # the number of its first node
        for depth in range(1, max(map(len, paths), default=0) + 1):
            here = [path for path in paths if len(path) == depth]
            # several nodes may have one parent, whose head is computed once
            above = sorted({before[path[:-1]] for path in here})
            row_of = {place: row for row, place in enumerate(above)}
            rows = [row_of[before[path[:-1]]] for path in here]
            ranks = [path[-1] for path in here]
            node_of = {key: i for i, key in enumerate(zip(rows, ranks, strict=True))}
            index = (torch.tensor(part, device=device) for part in (above, rows, ranks))
            self.append(Level(*index, row_of, node_of))
            parents += [first + before[path[:-1]] for path in here]
            self.paths += here
            first = len(self.paths) - len(here) + 1
            before = {path: i for i, path in enumerate(here)}
        self.parents = torch.tensor(parents, dtype=torch.long)
