from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from petl.data.tasks.base import IGNORED
from petl.data.tasks.token_classification import (
    TokenClassification,
    are_entities,
    entities,
    words_of_tokens,
)
from petl.errors import InputError

TAGS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]


def logits_for(predictions):
    """Logits whose maximum is at the predicted class, [1, T, C]."""
    return F.one_hot(torch.tensor([predictions]), len(TAGS)).float() * 5


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-A", [("A", 0, 1), ("A", 3, 3)]),
        ("B-A B-A", [("A", 0, 0), ("A", 1, 1)]),
        ("I-A I-A O I-B", [("A", 0, 1), ("B", 3, 3)]),  # IOB1: no beginning is marked
        ("B-A I-B I-B", [("A", 0, 0), ("B", 1, 2)]),
        ("S-A B-A E-A E-A I-A", [("A", 0, 0), ("A", 1, 2), ("A", 3, 3), ("A", 4, 4)]),
        ("U-A B-A I-A L-A", [("A", 0, 0), ("A", 1, 3)]),
        ("O O", []),
    ],
)
def test_entities_are_those_of_the_conll_scorer(tags, expected):
    """Results of seqeval 1.2.2, in which S and E are called U and L."""
    assert list(entities(tags.split())) == expected


def test_classes_are_entities_if_all_have_a_position_prefix():
    assert are_entities(TAGS)
    assert not are_entities(["NOUN", "VERB", "O"])
    assert not are_entities(["O"])
    assert not are_entities(["B-PER", "PRON"])


def test_f1_counts_complete_entities_over_uneven_batches():
    task = TokenClassification(classes=TAGS)
    # labels: PER(0,1) LOC(3) | LOC(0)       predictions: PER(0,1) PER(3) | LOC(0)
    rows = [([1, 3, 4, 0], [1, 3, 4, 1]), ([0], [0])]
    total = 0
    for labels, prediction in rows:
        labels = torch.tensor([[IGNORED, *labels, IGNORED]])
        logits = logits_for([4, *prediction, 2])
        total = total + task.score(SimpleNamespace(logits=logits), {"labels": labels})
    scores = task.summarize(total)
    assert (scores["precision"], scores["recall"], scores["f1"]) == pytest.approx((2 / 3,) * 3)
    # PER: one correct of two predicted and one labeled; LOC: one correct of one and two
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores["accuracy"] == pytest.approx(4 / 5)
    assert scores["words"] == 5


def test_other_classes_are_scored_per_word():
    task = TokenClassification(classes=["NOUN", "O", "VERB"])
    labels, prediction = torch.tensor([[0, 1, 2, 2, IGNORED]]), torch.tensor([[0, 1, 1, 2, 0]])
    logits = F.one_hot(prediction, 3).float()
    scores = task.summarize(task.score(SimpleNamespace(logits=logits), {"labels": labels}))
    words = labels[0, :4], prediction[0, :4]
    assert scores["f1"] == scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx(f1_score(*words, average="macro"))
    expected = F.cross_entropy(logits[0, :4], labels[0, :4]).item()
    assert scores["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_first_token_of_each_word_has_its_label(tokenizer):
    task = TokenClassification(classes=TAGS, max_length=10)
    rows = {"tokens": [["Ann", "is", "in", "Oslo"]], "tags": [[1, 4, 4, 0]]}
    (labels,) = task.encode_rows(tokenizer, rows)["labels"]
    # one token per byte: Ann_is_in_ is truncated before Oslo
    assert labels == [1, IGNORED, IGNORED, IGNORED, 4, IGNORED, IGNORED, 4, IGNORED, IGNORED]
    assert tokenizer.decode(task.encode_rows(tokenizer, rows)["input_ids"][0]) == "Ann is in "


@pytest.mark.parametrize("space", [0, 1])  # 1: a byte-level token begins with the space
def test_a_word_without_tokens_leaves_the_next_one_its_own(space):
    offsets = [(0, 0), (0, 2), (5 - space, 6), (0, 0)]  # of "ab ? c", whose ? is left out
    assert words_of_tokens(["ab", "?", "c"], offsets) == [IGNORED, 0, 2, IGNORED]


def test_a_tokenizer_without_offsets_is_refused():
    slow = SimpleNamespace(is_fast=False)
    task = TokenClassification(classes=TAGS)
    with pytest.raises(InputError):
        task.encode_rows(slow, {"tokens": [["a"]], "tags": [[0]]})


def test_the_confusion_matrix_has_a_row_for_each_label():
    task = TokenClassification(classes=TAGS)
    predicted, labels = [4, 4, 0, 1], [0, 4, 0, 3]
    total = task.score(
        SimpleNamespace(logits=logits_for(predicted)), {"labels": torch.tensor([labels])}
    )
    expected = torch.zeros(5, 5)
    for label, prediction in zip(labels, predicted, strict=True):
        expected[label, prediction] += 1
    assert torch.equal(total[1:26].view(5, 5).float(), expected)
