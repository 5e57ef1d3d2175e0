from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from petl.data.tasks.base import IGNORED
from petl.data.tasks.seq2seq import Seq2Seq


@pytest.fixture
def batch(tokenizer):
    task = Seq2Seq(max_length=6, max_target_length=4, prefix="x:")
    split = Dataset.from_dict({"text": ["abcdefgh", "a"], "target": ["b", "stuvw"]})
    return task, task.collate(tokenizer)(list(task.encode(tokenizer, split)))


def test_texts_have_the_prefix_and_both_sides_are_truncated_and_padded(batch, tokenizer):
    task, made = batch
    assert tokenizer.decode(made["input_ids"][0]) == "x:abcd"
    assert made["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert tokenizer.decode(made["labels"][1]) == "stuv"
    assert made["labels"][0, 1:].tolist() == [IGNORED] * 3
    assert task.items(made) == 5
    assert task.count(made) == 9 + 5
    assert task.positions(made) == 12 + 8


def test_loss_is_the_mean_over_the_tokens_of_targets(batch):
    task, made = batch
    logits = torch.randn(2, 4, 260)
    scores = task.summarize(task.score(SimpleNamespace(logits=logits), made))
    expected = F.cross_entropy(logits.flatten(0, 1), made["labels"].flatten())
    assert scores["tokens"] == 5
    assert scores["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-5)
