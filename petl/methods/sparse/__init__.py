"""Sparse fine-tuning: trains a small set of weight entries, exchanged by drop-and-grow.

Ansell et al. 2024, "Scaling Sparse Fine-Tuning to Large Language Models" (arXiv:2401.16405), where
it is called SpIEL. Every R updates a fraction of the entries is exchanged: those that have changed
least from the base weight are dropped, and the set grows at candidates with large gradients
accumulated over A updates (SpIEL-AG, `rigl`), or with large accumulators of the SM3 optimizer
(SpIEL-MA, `sm3`).

    config.py      the fields
    method.py      what wrapping and training a model ask
    budget.py      the number of tuned entries of each layer
    schedule.py    the steps at which gradients are accumulated and entries exchanged
    adapter.py     the tuned entries of a layer, candidate gradients, the exchange
    selection.py   drop-and-grow after an update, and checks of the optimizer
    sm3.py         the SM3 optimizer
    compiled.py    the layer as a custom operator, for torch.compile

Shapes: I in, O out. The weight of a layer is stored as [P, Q], that is [O, I] (Conv1D: [I, O]); K
entries of it are tuned, `values` [K] at the flat positions `indices` [K].

Where we depart from the authors' code: gradients are accumulated over A updates before every
selection, as in the paper (the code: A + 1 in all but the first); Adam's moments of new entries are
initialized from the gradients of complete updates (the code: of micro-batches, which is too small
under gradient accumulation), clipped like the optimizer's own; indices stay sorted;
candidates are the largest gradients of a complete update, averaged over processes (the code: of its
first micro-batch). Until that update ends, its gradients are summed in full, 4 bytes for each
weight of the adapted layers, once in R updates; of an update of one micro-batch, as `Lifecycle`
knows, a block of rows at a time.
"""

from petl.methods.sparse.adapter import SparseAdapter
from petl.methods.sparse.config import SparseConfig
from petl.methods.sparse.method import Sparse
from petl.methods.sparse.sm3 import SparseSM3

__all__ = ["Sparse", "SparseAdapter", "SparseConfig", "SparseSM3"]
