"""Shrink a model: MLP channels and heads leave it, and a plain smaller model stays.

Wang et al. 2025, "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine
Activation Information", COLING (arXiv:2409.13199).

    counts.py       how many channels each block keeps: pure functions
    calibration.py  the forward pass: importance of the blocks, norms of the channels
    heads.py        groups of heads
    config.py       the fields of a config that say how many there are
    model.py        petl.shrink: the smaller model
    folder.py       petl.load_shrunk: a folder whose blocks have MLPs of unequal widths
    source.py       what petl shrink makes smaller, and the settings of its recovery
    command.py      the work of petl shrink
"""
