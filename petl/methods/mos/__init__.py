"""MoS: low-rank factors glued together from shards that the layers of a model share.

Wang et al. 2025, "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of
Shards", ICLR (arXiv:2410.00938).

    config.py    the fields
    draw.py      which layers share pools, and which shards each draws
    adapter.py   the pools, and the factors that a layer makes of its shards
    tuner.py     putting them in place, and gathering for all layers at once

Shapes: I in, O out, R rank, E equivalent rank (the budget), P private rank, S shards per vector,
L layers of a group. A group is all targets that play one role, such as every `q_proj`. It has two
pools of shards, `pool_A` [E L S, I/S] and `pool_B` [E L S, O/S]; rows below (E-P) L S are public,
then each layer has P S rows of its own. A layer holds the rows it draws, `index_A` and `index_B`
[R S], public ones first; row j of its A is shards j S to j S + S - 1 side by side. So it is a LoRA
of rank R, and all of them have as many parameters as LoRA of rank E.

Each of the paper's four differentiators can be switched off: subset selection and pair dissociation
by their fields, vector sharding by shards_per_vector=1, shard privatization by private_rank=0.

Where the sources disagree: the routing is a frozen draw and a pool belongs to one group, as in the
authors' code, not "MoE-like" and global as in the text; the frozen random scaling of the code is
left out, for it is the identity. The draw has a generator of its own, so that all processes agree.
"""

from petl.methods.mos.adapter import MosAdapter
from petl.methods.mos.config import MosConfig
from petl.methods.mos.draw import draw
from petl.methods.mos.tuner import MosModel

__all__ = ["MosAdapter", "MosConfig", "MosModel", "draw"]
