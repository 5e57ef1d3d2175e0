"""MoS: low-rank factors concatenated from shards of pools that the layers of a model share.

Wang et al. 2025, "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of
Shards", ICLR (arXiv:2410.00938).

    config.py    the fields
    draw.py      groups of layers that share pools, and the shards that each layer draws
    adapter.py   the pools, and the factors of a layer
    method.py    what wrapping a model asks, and one gather for all layers of a group

Shapes: I in, O out, R rank, E equivalent rank (the budget), P private rank, S shards per vector,
L layers of a group. A group is all targets of one role, such as every `q_proj`. It has two pools of
shards, `pool_A` [E L S, I/S] and `pool_B` [E L S, O/S]: first (E-P) L S public rows, then P S
private rows for each layer. `index_A` and `index_B` [R S] are the rows that a layer draws, public
ones first; row j of its A is the concatenation of shards j S to j S + S - 1. So each layer has a
LoRA of rank R, and all of them together have as many parameters as LoRA of rank E.

Each of the paper's four differentiators can be disabled: subset selection and pair dissociation by
their fields, vector sharding by shards_per_vector=1, shard privatization by private_rank=0.

Where the sources disagree: the routing is a fixed random draw and a pool belongs to one group, as
in the authors' code, not "MoE-like" and global as in the text; the frozen random scaling of the
code is left out, since it is the identity. The draw has its own generator, so that all processes
draw the same shards.
"""

from petl.methods.mos.adapter import MosAdapter
from petl.methods.mos.config import MosConfig
from petl.methods.mos.draw import draw
from petl.methods.mos.method import Mos

__all__ = ["Mos", "MosAdapter", "MosConfig", "draw"]
