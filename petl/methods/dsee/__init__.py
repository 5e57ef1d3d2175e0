"""DSEE: low-rank updates with a few free entries, then pruned base weights, then on with both.

Chen, Chen, Chen, Awadallah, Wang, Cheng 2023, "DSEE: Dually Sparsity-embedded Efficient Tuning of
Pre-trained Language Models", ACL (arXiv:2111.00160). The update is a low-rank product plus entries
at fixed places, those of the largest weights beside a low-rank part. After some training, `prune`
sets base weights, or those of whole attention heads, to zero, by what was learned; the update
trains on, unmasked.

    config.py      fields, and the lists of modules
    adapter.py     trained tensors, mask and products of a layer
    prune.py       scores, groups and heads
    method.py      positions of the entries, pruning in a run, files

Shapes: I in, O out, R rank, N entries. The arithmetic is in petl/ops: support.py (positions),
entries.py (products), masks.py (masks).

Where we depart from the authors' code (VITA-Group/DSEE): the places are chosen for a number of
entries, as in the paper (there by a threshold of 0.01 after the low-rank part has grown to almost
full rank, so that they are the top of a small residual); the factor lora_alpha / r is that of both
parts, in the update and in all scores (there of one part, or left out, in some modes); heads are
scored by the update alone (there plus |W|); the scores that are reciprocals are left out; names of
modules are matched as PEFT does (there as substrings, which prunes pooler and classifier too); the
number of pruned weights is exact.
"""

from petl.methods.dsee.adapter import DseeAdapter
from petl.methods.dsee.config import DseeConfig
from petl.methods.dsee.method import Dsee, prune_base

__all__ = ["Dsee", "DseeAdapter", "DseeConfig", "prune_base"]
