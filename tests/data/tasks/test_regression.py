from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr

from petl.data.tasks.regression import Regression

NONE = Dataset.from_dict({})


def test_scores_agree_with_scipy_also_where_values_are_tied():
    draw = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (40,), generator=draw).float()
    prediction = (label + torch.randn(40, generator=draw)).round()
    task = Regression()
    values = task.score(SimpleNamespace(logits=prediction[:, None]), {"labels": label})
    scores = task.summarize_rows(values, NONE)
    assert scores["pearson"] == pytest.approx(pearsonr(prediction, label).statistic, rel=1e-6)
    assert scores["spearman"] == pytest.approx(spearmanr(prediction, label).statistic, rel=1e-6)
    assert scores["mse"] == pytest.approx(((prediction - label) ** 2).mean().item(), rel=1e-6)
    assert scores["rows"] == 40


def test_a_correlation_with_a_constant_is_zero():
    values = torch.tensor([[1.0, 2.0], [1.0, 3.0]])
    scores = Regression().summarize_rows(values, NONE)
    assert (scores["pearson"], scores["spearman"], scores["mse"]) == (0, 0, 2.5)
    # numbers whose mean is rounded: what is left of each is not 0
    values = torch.tensor([[0.1, 0.7]], dtype=torch.float64).expand(9, 2)
    scores = Regression().summarize_rows(values, NONE)
    assert (scores["pearson"], scores["spearman"]) == (0, 0)


def test_labels_are_floats_in_a_batch(tokenizer):
    split = Dataset.from_dict({"text": ["abc", "d"], "label": [2.5, -1.0]})
    task = Regression(max_length=8)
    encoded = task.encode(tokenizer, split)
    batch = task.collate(tokenizer)(list(encoded))
    assert batch["labels"].tolist() == [2.5, -1.0]
    assert batch["labels"].dtype == torch.float32
    logits = torch.tensor([[3.0], [2.0]])  # errors of 0.5 and 3
    assert task.head_loss(logits, batch).item() == (0.5**2 + 3**2) / 2
    assert task.model_kwargs()["num_labels"] == 1
