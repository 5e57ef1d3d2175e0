"""IncreLoRA: low-rank updates that begin at rank 1 and grow where the loss asks for it.

Zhang et al. 2023, "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient
Fine-tuning" (arXiv:2308.12043). Every `deltaT` steps the `top_h` modules whose update matters most
receive `rank_step` more components, until the budget is spent. The next components of each module
learn in advance, as a reserve with a weight of 1e-5.

    config.py    the fields, and what follows from them for a number of modules
    adapter.py   the components of one layer
    tuner.py     importance, growth, saving
    rates.py     a learning rate for each component, from its birth on

Shapes: I in, O out, R live rank, C capacity of a layer, N modules, T tokens.

Where the sources disagree: the score is divided by the square root of the number of entries, as in
the authors' code (`score_norm: mean` for the paper); the penalty is the norm of the stacked Gram
matrices, not squared, as in the code; the reserve is there from the first step, as in the paper.
Where we depart from the code: every module has its full capacity of rows from the beginning, so
that optimizers, schedulers and DDP see the same parameters all along (rows that are not born yet
have zero gradients); the budget is met exactly; the reserve is dropped when it is; neither reserve
nor penalty enters an evaluation; scores are averaged over processes.
"""

from petl.methods.increlora.adapter import IncreloraAdapter
from petl.methods.increlora.config import IncreloraConfig
from petl.methods.increlora.tuner import IncreloraModel

__all__ = ["IncreloraAdapter", "IncreloraConfig", "IncreloraModel"]
