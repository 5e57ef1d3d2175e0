"""Pooling by the mask, whichever side is padded; equal to sentence-transformers'."""

import pytest
import torch

from petl.ops.retrieval import pool

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]])


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_only_real_tokens_count(how):
    states = torch.randn(4, 5, 3, dtype=torch.float64)
    for row, mask in enumerate(MASK):
        real = states[row][mask.bool()]
        expected = {"mean": real.mean(0), "cls": real[0], "last": real[-1]}[how]
        torch.testing.assert_close(pool(states, MASK, how)[row], expected)


@pytest.mark.parametrize(
    ("how", "theirs"), [("mean", "mean"), ("cls", "cls"), ("last", "lasttoken")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_sentence_transformers(how, theirs, dtype):
    models = pytest.importorskip("sentence_transformers.models")
    states = torch.randn(4, 5, 3, dtype=dtype)
    features = {"token_embeddings": states, "attention_mask": MASK}
    expected = models.Pooling(3, pooling_mode=theirs)(features)["sentence_embedding"]
    assert torch.equal(pool(states, MASK, how), expected)
