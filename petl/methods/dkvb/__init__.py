"""DKVB: a classification head of keys and values, of which a row reads and trains a few.

Träuble et al. 2023, "Discrete Key-Value Bottleneck", ICML (arXiv:2207.11240). A frozen encoder's
output is cut into pieces, each piece picks its nearest key in a frozen codebook, and the values of
the picked keys are added up to logits. An update changes the picked values only, so that classes
which arrive one after the other overwrite little of what was learnt before.

    config.py      the fields, and the head of a model
    keys.py        nearest keys, and the key phase: a moving average before training, no labels
    adapter.py     keys and values on the head
    pooling.py     the mean of the encoder's last states as input
    optimizer.py   Adam for picked values only; which optimizers leave the others alone
    method.py      injection, key phase over the model and all processes, metrics

Shapes: N rows (or tokens, where the head runs per token), D width of the encoder, C codebooks, K
pairs of each, d width of a key, v of a value, O classes. For the encoder's output z [D]:

    z_c = R_c z,  R_c [d, D] fixed, entries N(0, 1/D)      (split: the c-th D/C entries of z)
    k(c) = argmin_k |z_c - key_ck|^2, the first of equal ones
    logits = 1/C sum_c value_{c, k(c)}                     (linear: W [O, C v] (value_1, ..))

Key phase, once a batch, with counts n_k and sums s_k of the pieces whose nearest key is k before
the update, N = 1 and M = key at the start:

    N <- g N + (1-g) n     M <- g M + (1-g) s     key = M / N',  N' = (N + e) / (sum N + K e) sum N

and a key with N below `dead` restarts at a random piece of the batch, with N = 1.

The first code read (github.com/pedrocg42/discrete-key-value-bottleneck) tests divisibility with
`&`, and applies softmax before cross-entropy; neither is followed.
"""

from petl.methods.dkvb.adapter import DkvbAdapter
from petl.methods.dkvb.config import DkvbConfig
from petl.methods.dkvb.keys import Keys
from petl.methods.dkvb.method import Dkvb, learn_keys
from petl.methods.dkvb.optimizer import SparseAdam

__all__ = ["Dkvb", "DkvbAdapter", "DkvbConfig", "Keys", "SparseAdam", "learn_keys"]
