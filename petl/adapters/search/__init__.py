"""Search one level for each of many units under one budget, such as a density for each layer.

Sieberling et al., "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
ICML 2025, arXiv:2410.14649. `evolve` is for levels of any kind; `levels_of` makes those of
an adapter: its density, rank or bits, or skipped blocks.
"""

from petl.adapters.search.divergence import Divergence, TaskLoss
from petl.adapters.search.evolve import Evolution, Generation, even, evolve
from petl.adapters.search.levels import WHAT, levels_of
from petl.adapters.search.units import Unit, swapped

__all__ = [
    "WHAT",
    "Divergence",
    "Evolution",
    "Generation",
    "TaskLoss",
    "Unit",
    "even",
    "evolve",
    "levels_of",
    "swapped",
]
