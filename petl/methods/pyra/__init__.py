"""PYRA: merges similar tokens between attention and MLP, with a trained correction.

Xiong et al. 2024, "PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task
Adaptation", ECCV (arXiv:2403.09192); token merging is ToMe, Bolya et al. 2023, "Token Merging: Your
ViT But Faster", ICLR (arXiv:2210.09461). The adapted encoder is faster than the base.

    config.py    the fields, the schedules, and what they mean in a model
    blocks.py    the forms of blocks that are known, and attention that returns its keys
    adapter.py   merging and its correction in one block
    method.py    beside an inner method or alone
    inner_adapter.py    the inner method's adapter as one of its own

Shapes: N rows, T tokens, C width, R tokens that a block removes. After attention and its residual
sum, the tokens v = x s (s: of how many tokens each is the mean) at R positions, S [N, R, C], are
added to their partners D [N, R, C], which `petl.methods.pyra.token_merging` finds by the keys.
Before that, with the block's two vectors a [R, 1] and b [1, C],

    P = LayerNorm(S + D)    Wc = 2 sigmoid(a^T P)    Wt = 2 sigmoid(P b^T) - 1
    S <- S + (S Wc) Wt

b starts at zero, where this is plain ToMe. Blocks behind the first one add log s to the logits of
their keys (proportional attention).

Where we depart from the authors' code: a key of zero has similarity 0, not NaN; sums are computed
in float32 in every precision; the tokens to remove are limited by the image's size before tensors
are created (the code does so afterwards and then fails on their shapes); `vector_lr` sets the
learning rate of the vectors (the code chooses them by a name that none of them has).
"""

from petl.methods.pyra.config import PyraConfig
from petl.methods.pyra.inner_adapter import save_inner
from petl.methods.pyra.method import Pyra, merged_sizes

__all__ = ["Pyra", "PyraConfig", "merged_sizes", "save_inner"]
