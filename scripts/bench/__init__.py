"""Benchmark of the methods: training, files and serving, relative to a lower bound.

`scripts/bench.py` is the command; docs/performance.md explains the lower bound and the goals.
Everything is measured through the public API (`petl.wrap`, PeftModel, `save_pretrained`), on models
with random weights, so that nothing is downloaded.

The lower bound ("floor" in code and records): forward and backward of the frozen backbone down to
the embeddings, with the same loss: 4 N T multiply-adds for N weights that multiply activations and
T tokens. Counts (`counters`) are exactly reproducible, and tests assert them; times (`clocks`) are
not.
"""
