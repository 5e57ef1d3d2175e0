"""Ranks by the importance of blocks: measured in one forward pass, turned into `rank_pattern`.

    importance = petl.ranks.block_importance(model, batches)     # of each block, in order
    ranks = petl.ranks.allocate(importance, mean=8)              # with the same sum as rank 8
    config = petl.ranks.with_ranks(petl.build_config("lora", r=8), model, ranks)
    model = petl.wrap(model, config)

Wang et al. 2025, "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine
Activation Information", COLING (arXiv:2409.13199), measures blocks so, prunes by it, and gives LoRA
more rank where a block is important. The published code has the pruning only, whose two formulas
are `keep_ratios` and `channel_scores`. How ranks follow from importance, `allocate`, is ours.

    importance.py   block_importance: hooks on the blocks, over padding-free tokens, all processes
    allocation.py   allocate, with_ranks
    pruning.py      keep_ratios, channel_scores: pure functions, which `petl.shrink` uses
    settings.py     the settings under `ranks` of a run
    run.py          the feature of a run: checks, measurement, ranks.json
    targets.py      the blocks with targets in a run, the mean, and the cost of a rank
"""

from petl.training.ranks.allocation import allocate, with_ranks
from petl.training.ranks.importance import METRICS, block_importance
from petl.training.ranks.pruning import channel_scores, keep_ratios

__all__ = [
    "METRICS",
    "allocate",
    "block_importance",
    "channel_scores",
    "keep_ratios",
    "with_ranks",
]
