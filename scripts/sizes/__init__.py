"""Bytes against score: adapters of the quickstart compressed, quantized, pruned and combined.

`scripts/sizes.py` is the command. A study folder contains:

    data/*.csv           rows of the tasks that petl does not include
    TASK/runs/...        trained adapters, by `petl.experiments.sweeps.study`
    bits/...             the same for binary, with a choice between two learning rates
    records/NAME.json    one result each; finished ones are kept, so that a stopped study resumes
"""
