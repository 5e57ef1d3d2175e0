"""IncreLoRA: low-rank updates that start at rank 1 and grow during training, by importance.

Zhang et al. 2023, "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient
Fine-tuning" (arXiv:2308.12043). Every `deltaT` steps the ranks of the `top_h` most important
modules grow by `rank_step`, until the budget is reached. The next components of each module, its
reserve, are trained in advance with a weight of 1e-5.

    config.py           the fields, and the growth schedule that follows from them
    adapter.py          the components of one layer
    method.py           importance, growth, saving
    learning_rates.py   per-component learning rates

Shapes: I in, O out, R active rank, C capacity of a layer, N modules, T tokens. A component is one
rank-1 term of an update: a row of A, a column of B and a weight in E. Active components come first,
then the reserve, then inactive ones.

Where the sources disagree: the score is divided by the square root of the number of entries, as in
the authors' code (`score_norm: mean` for the paper); the penalty is the norm of the stacked Gram
matrices, not squared, as in the code; the reserve exists from the first step, as in the paper.
Where we depart from the code: every module has its full capacity of rows from the beginning, so
that optimizers, schedulers and DDP have the same parameters throughout (inactive rows have zero
gradients); the budget is met exactly; there is no reserve once it is met; evaluation includes
neither reserve nor penalty; scores are averaged over processes.
"""

from petl.methods.increlora.adapter import IncreloraAdapter
from petl.methods.increlora.config import IncreloraConfig
from petl.methods.increlora.method import (
    Increlora,
    active_layers,
    active_parameters,
    growth_finished,
    importance_scores,
    rank_pattern,
)

__all__ = [
    "Increlora",
    "IncreloraAdapter",
    "IncreloraConfig",
    "active_layers",
    "active_parameters",
    "growth_finished",
    "importance_scores",
    "rank_pattern",
]
