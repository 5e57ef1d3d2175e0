"""The order of rows of a class-incremental stream."""

from dataclasses import replace

import numpy as np

from petl.data.batch_sampler import StepSampler
from petl.data.class_stream import ClassStream

LABELS = np.array([2, 0, 0, 2, 1, 0, 2, 0, 0, 4])  # five rows of class 0, none of class 3


def sampler(repeats=2, **fields) -> StepSampler:
    stream = ClassStream(LABELS, 2, repeats)
    steps = len(stream.sizes)
    return replace(StepSampler(10, 2, None, steps, seed=0, buckets=stream), **fields)


def test_each_class_has_its_passes_before_the_next_one():
    batches = list(sampler().global_batches())
    # 3 + 1 + 2 + 1 steps of a pass, twice
    assert [len(rows) for rows in batches] == [2, 2, 1, 2, 2, 1, 1, 1, 2, 1, 2, 1, 1, 1]
    classes = [{int(LABELS[row]) for row in rows} for rows in batches]
    assert classes == [{0}] * 6 + [{1}] * 2 + [{2}] * 4 + [{4}] * 2
    for start in (0, 3):
        rows = [row for batch in batches[start : start + 3] for row in batch]
        assert sorted(rows) == [1, 2, 5, 7, 8]
    assert batches[:3] != batches[3:6]  # each pass has an order of its own
    assert ClassStream(LABELS, 2, 2).ends == {6: 0, 8: 1, 12: 2, 14: 4}


def test_the_order_depends_on_the_seed_alone_and_resumes_anywhere():
    batches = list(sampler().global_batches())
    assert list(sampler().global_batches()) == batches
    assert list(sampler(done=5).global_batches()) == batches[5:]
    assert list(sampler(seed=1).global_batches()) != batches
    parts = [list(sampler(rank=rank, processes=2)) for rank in (0, 1)]
    for rows, one, other in zip(batches, *parts, strict=True):
        assert {*one, *other} == {*rows}
