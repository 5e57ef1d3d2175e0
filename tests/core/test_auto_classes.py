"""PEFT's auto classes build the base model with the labels of a run's adapter."""

import json

import peft
import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
)

import petl
from petl import testing
from petl.core.auto_classes import read_labels
from petl.data.tasks.base import write_labels
from petl.system.files.paths import LABELS

NAMES = {0: "fox", 1: "dog", 2: "owl"}
FIELDS = {"num_labels": 3, "id2label": NAMES, "label2id": {v: k for k, v in NAMES.items()}}
HEADS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, peft.AutoPeftModelForSequenceClassification),
    "TOKEN_CLS": (AutoModelForTokenClassification, peft.AutoPeftModelForTokenClassification),
    None: (AutoModelForImageClassification, peft.AutoPeftModel),  # PEFT has no type for images
}


@pytest.mark.parametrize("name", ["lora", "mola"])
@pytest.mark.parametrize("task_type", HEADS)
def test_an_adapter_is_loaded_with_its_labels(name, task_type, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny = testing.TINY_MODELS["bert" if task_type else "vit"]
    tiny.build().save_pretrained(base)  # its head has other classes
    auto_model, auto_peft = HEADS[task_type]
    model = auto_model.from_pretrained(base, ignore_mismatched_sizes=True, **FIELDS)
    fields = {"target_modules": "block-linear", "modules_to_save": ["classifier"]}
    model = testing.stir(petl.wrap(model, name, task_type=task_type, **fields))
    model.save_pretrained(folder)
    write_labels(folder, {**FIELDS, "problem_type": "single_label_classification"})
    loaded = auto_peft.from_pretrained(folder)
    assert loaded.config.id2label == NAMES
    assert loaded.config.label2id == FIELDS["label2id"]
    assert loaded.config.num_labels == 3
    batch = {key: value for key, value in tiny.batch().items() if key != "labels"}
    assert torch.equal(testing.logits(loaded, batch), testing.logits(model, batch))


def test_labels_that_the_caller_gives_come_first_and_mismatches_stay_errors(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    testing.tiny_bert(1).save_pretrained(base)
    model = BertForSequenceClassification.from_pretrained(base)
    petl.wrap(model, "lora", task_type="SEQ_CLS", r=2).save_pretrained(folder)
    write_labels(folder, {"id2label": dict.fromkeys(range(4), "x")})  # the head has 5
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(folder)
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert loaded.config.num_labels == 5


def test_without_labels_nothing_is_saved_and_nothing_changes(tmp_path):
    write_labels(tmp_path, {"num_labels": 2})
    assert not (tmp_path / LABELS).exists()
    assert read_labels(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"id2label": {}, "problem_type": null}',
        '{"id2label": {"1": "a"}, "problem_type": null}',
        '{"id2label": {"0": 5}, "problem_type": null}',
        '{"id2label": {"0": "a"}, "problem_type": "other"}',
        '{"id2label": {"0": "a"}}',
        "[" * 100_000,
    ],
)
def test_a_strangers_labels_are_checked(content, tmp_path):
    (tmp_path / LABELS).write_text(content)
    with pytest.raises(petl.InputError, match=LABELS):
        read_labels(tmp_path)


def test_nothing_else_of_a_strangers_file_reaches_the_base_model(tmp_path):
    saved = {"id2label": {"0": "a"}, "problem_type": None, "trust_remote_code": True}
    (tmp_path / LABELS).write_text(json.dumps(saved))
    assert set(read_labels(tmp_path)) == {"id2label", "label2id", "problem_type"}
    assert BertConfig(**read_labels(tmp_path)).num_labels == 1
