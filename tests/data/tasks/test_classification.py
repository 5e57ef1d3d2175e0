from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef

from petl.data.tasks.classification import Classification
from petl.errors import InputError


@pytest.fixture
def task():
    return Classification(classes=["a", "b", "c", "d"], max_length=8)


def predictions(rows, classes, predicted, seed=0):
    """Random labels, and logits over `classes` of which only `predicted` classes are predicted."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    logits[:, predicted:] -= 100
    return logits, torch.randint(0, 3, (rows,), generator=generator)


@pytest.mark.parametrize("predicted", [1, 2, 4])
def test_scores_agree_with_scikit_learn_over_uneven_batches(task, predicted):
    # class d is never a label; with predicted=1 only class a is predicted
    logits, labels = predictions(37, 4, predicted)
    total = sum(
        task.score(SimpleNamespace(logits=logits[part]), {"labels": labels[part]})
        for part in torch.arange(37).split(16)
    )
    scores = task.summarize(total)
    prediction = logits.argmax(-1)
    confusion = confusion_matrix(labels, prediction, labels=range(4))  # a row for each label
    assert total[1:].view(4, 4).tolist() == confusion.tolist()
    assert scores["rows"] == 37
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, prediction))
    expected = f1_score(labels, prediction, average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(expected)
    assert scores["matthews"] == pytest.approx(matthews_corrcoef(labels, prediction), abs=1e-12)
    assert scores["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_scores_of_half_precision_logits_are_summed_in_float64(task):
    logits, labels = predictions(64, 4, 4)
    total = task.score(SimpleNamespace(logits=logits.bfloat16()), {"labels": labels})
    assert total.dtype == torch.float64
    expected = F.cross_entropy(logits.bfloat16().float(), labels, reduction="sum")
    assert total[0].item() == pytest.approx(expected.item())


def test_rows_are_truncated_padded_and_counted(task, tokenizer):
    split = Dataset.from_dict({"text": ["abc", "abcdefghij"], "label": [2, 0]})
    encoded = task.encode(tokenizer, split)
    batch = task.collate(tokenizer)([encoded[0], encoded[1]])
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 8]
    assert tokenizer.decode(batch["input_ids"][1]) == "abcdefgh"
    assert batch["input_ids"][0, 3:].tolist() == [tokenizer.pad_token_id] * 5
    assert batch["labels"].tolist() == [2, 0]
    assert task.items(batch) == 2


def test_length_can_be_rounded_up(task, tokenizer):
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1}
    assert task.collate(tokenizer, multiple=8)([row])["input_ids"].shape == (1, 8)


def test_a_text_without_tokens_is_refused(task, tokenizer):
    with pytest.raises(InputError):
        task.encode(tokenizer, Dataset.from_dict({"text": ["a", ""], "label": [0, 1]}))


def test_two_texts_are_encoded_together_with_token_types(task, tokenizer):
    """As with BERT's tokenizer; a tokenizer without token types gives none."""
    split = Dataset.from_dict({"text": ["abc"], "text_pair": ["de"], "label": [1]})
    encoded = task.encode(tokenizer, split)[0]
    assert tokenizer.decode(encoded["input_ids"]) == "abcde"
    assert "token_type_ids" not in encoded
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    marked = task.encode_rows(tokenizer, split.to_dict())
    batch = task.collate(tokenizer)([{k: v[0] for k, v in marked.items()}])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]


def test_the_model_config_has_the_names_of_the_classes(task):
    assert task.model_kwargs()["id2label"] == {0: "a", 1: "b", 2: "c", 3: "d"}
    assert task.model_kwargs()["label2id"]["c"] == 2


def test_of_many_classes_the_most_probable_are_listed():
    task = Classification(classes=[f"class {i}" for i in range(120)], max_length=8)
    weights = (torch.arange(120) * 37 % 120 + 1).double()  # each of 1 to 120 once
    (described,) = (
        found for _, found in task.described([(weights / weights.sum()).numpy()], [{"_number": 0}])
    )
    best = weights.argsort(descending=True)[:10].tolist()
    assert list(described["probabilities"]) == [f"class {i}" for i in best]
    assert described["prediction"] == f"class {best[0]}"
