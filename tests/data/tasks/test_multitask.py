"""Several classification tasks in one head: equal to a head each, in loss, gradients and scores."""

import copy
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from training_fixtures import bert_config, llama_config
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

import petl
from petl.data.tasks.base import FILE, write_task
from petl.data.tasks.multitask import MultitaskClassification
from petl.data.tasks.task_file import read_task
from petl.errors import InputError

pytest_plugins = ["training_fixtures"]
CLASSES = ["verbs/a", "verbs/b", "verbs/c", "tone/bad", "tone/good", "size/a", "size/s/m"]
SIZES = {"verbs": 3, "tone": 2, "size": 2}


def task_of(**changes):
    fields = {"classes": CLASSES, "max_length": 9, "tasks": [*SIZES], "limits": [9, 4, 6]}
    return MultitaskClassification(**{**fields, **changes})


def classifier(family, classes=7):
    torch.manual_seed(3)
    config = {"bert": bert_config, "llama": llama_config}[family]()
    config.num_labels = classes
    config.problem_type = "single_label_classification"
    kind = {"bert": BertForSequenceClassification, "llama": LlamaForSequenceClassification}[family]
    return kind(config)


def batch_of(rows=12):
    torch.manual_seed(1)
    ids = torch.randint(4, 12, (rows, 5))
    labels = torch.arange(rows) * 5 % 7  # all classes, in no order
    tasks = torch.tensor([0, 0, 0, 1, 1, 2, 2])[labels]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "labels": labels, "task_ids": tasks}


def separate_heads(family, joint):
    """The same backbone with a linear layer for each task, and a function of their mean loss."""
    model = classifier(family)
    model.load_state_dict(joint.state_dict())
    name = "classifier" if family == "bert" else "score"
    whole, heads, first = getattr(model, name), nn.ModuleList(), 0
    for size in SIZES.values():
        head = nn.Linear(whole.in_features, size, bias=whole.bias is not None)
        with torch.no_grad():
            head.weight.copy_(whole.weight[first : first + size])
            if whole.bias is not None:
                head.bias.copy_(whole.bias[first : first + size])
        heads.append(head)
        first += size
    setattr(model, name, nn.Identity())
    model.heads = heads

    def loss(batch):
        rows = [model(input_ids=batch["input_ids"][i : i + 1]).logits[0] for i in range(12)]
        total, starts = torch.zeros(()), [0, 3, 5]
        for vector, label, task in zip(rows, batch["labels"], batch["task_ids"], strict=True):
            scores = heads[task](vector)
            total = total - scores.log_softmax(-1)[label - starts[task]]
        return total / len(rows)

    return model, loss


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_equals_that_of_a_head_for_each_task(family):
    joint = classifier(family)
    task_of().adjust(joint)
    apart, loss_apart = separate_heads(family, joint)
    count = [sum(p.numel() for p in model.parameters()) for model in (joint, apart)]
    assert count[0] == count[1]
    batch = batch_of()
    # a large eps: else an entry whose gradient is rounding alone makes a whole step
    settings = {"lr": 1e-2, "eps": 1e-4}
    optimizers = [torch.optim.AdamW(model.parameters(), **settings) for model in (joint, apart)]
    for _ in range(4):
        losses = joint(**batch).loss, loss_apart(batch)
        torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    name = "classifier" if family == "bert" else "score"
    stacked = torch.cat([head.weight for head in apart.heads])
    torch.testing.assert_close(getattr(joint, name).weight, stacked, atol=1e-5, rtol=0)
    before = classifier(family)
    for key, value in before.base_model.state_dict().items():
        after = joint.base_model.state_dict()[key]
        torch.testing.assert_close(after, apart.base_model.state_dict()[key], atol=1e-4, rtol=0)
        if value.dim() == 2 and "position" not in key and "pooler" not in key:
            assert not torch.equal(after, value) or "token_type" in key


def test_the_loss_is_that_of_the_tasks_own_classes_only():
    model = classifier("bert")
    task_of().adjust(model)
    batch = {k: v[:1] for k, v in batch_of().items()}  # label 0, of verbs
    found = model(**batch)
    found.loss.backward()
    assert model.classifier.weight.grad[3:].abs().max() == 0
    assert model.classifier.weight.grad[:3].abs().min() > 0
    expected = F.cross_entropy(found.logits[:, :3], batch["labels"])
    torch.testing.assert_close(found.loss, expected)
    as_tuple = model(**batch, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected)
    torch.testing.assert_close(as_tuple[1], found.logits)
    unlabeled = model(**{k: v for k, v in batch.items() if k != "labels"})
    assert unlabeled.loss is None
    torch.testing.assert_close(unlabeled.logits, found.logits)


@pytest.mark.parametrize("method", ["lora", "polyhistor"])
def test_a_method_trains_the_masked_loss_and_a_copy_keeps_it(method):
    model = classifier("bert")
    task_of().adjust(model)
    more = {"tasks": [*SIZES]} if method == "polyhistor" else {"target_modules": ["query"]}
    model = petl.wrap(model, method, r=4, task_type="SEQ_CLS", **more).eval()
    batch = batch_of()
    for each in (model, copy.deepcopy(model)):
        found = each(**batch)
        logits = found.logits
        losses = []
        for row, label in zip(logits, batch["labels"].tolist(), strict=True):
            first, end = next(s for s in ((0, 3), (3, 5), (5, 7)) if s[0] <= label < s[1])
            losses.append(F.cross_entropy(row[first:end], torch.tensor(label - first)))
        torch.testing.assert_close(found.loss, torch.stack(losses).mean())


def test_scores_are_those_of_each_task_alone_and_their_means():
    task, rng = task_of(), np.random.default_rng(0)
    labels = rng.integers(0, 7, 200)
    logits = torch.tensor(rng.normal(size=(200, 7)), dtype=torch.float32)
    logits[:, 4] += 9  # of another task than most rows: must not matter to them
    parts = [
        task.score(type("Out", (), {"logits": logits[i : i + 50]}), {"labels": torch.tensor(own)})
        for i, own in zip(range(0, 200, 50), np.split(labels, 4), strict=True)
    ]
    found = task.summarize(torch.stack(parts).sum(0))
    accuracies, f1s, right = [], [], 0
    for first, name in zip((0, 3, 5), SIZES, strict=True):
        rows = (labels >= first) & (labels < first + SIZES[name])
        own = logits[torch.tensor(rows)][:, first : first + SIZES[name]]
        truth, guess = labels[rows] - first, own.argmax(-1).numpy()
        accuracies.append(accuracy_score(truth, guess))
        f1s.append(f1_score(truth, guess, average="macro"))
        right += (truth == guess).sum()
        assert found[f"{name}_accuracy"] == pytest.approx(accuracies[-1])
        assert found[f"{name}_macro_f1"] == pytest.approx(f1s[-1])
        loss = F.cross_entropy(own, torch.tensor(truth)).item()
        assert found[f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["mean_accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["mean_macro_f1"] == pytest.approx(np.mean(f1s))
    assert found["accuracy"] == pytest.approx(right / 200)
    assert found["rows"] == 200
    assert found[task.metric] == found["mean_accuracy"]


def test_a_task_without_rows_has_no_part_in_the_means(petl_log):
    task = task_of()
    outputs = type("Out", (), {"logits": torch.zeros(2, 7)})
    found = task.summarize(task.score(outputs, {"labels": torch.tensor([0, 4])}))
    assert found["mean_accuracy"] == found["accuracy"] == 0.5  # 0 is the first of equal logits
    assert "size_accuracy" not in found
    assert "no examples of task size" in petl_log.text


def test_predictions_have_the_labels_of_the_rows_task():
    task = task_of()
    outputs = type("Out", (), {"logits": torch.tensor([[9.0, 0, 0, 1, 2, 5, 4]] * 3)})
    values = task.predict(outputs, {"task_ids": torch.tensor([0, 1, 2])}).numpy()
    np.testing.assert_allclose(values.sum(1), 1, rtol=1e-6)
    rows = [{"_number": 7, "labels": 1}, {"_number": 8}, {"_number": 9}]
    found = dict(task.described(values, rows))
    assert [found[i]["prediction"] for i in (7, 8, 9)] == ["a", "good", "a"]
    assert [[*found[i]["probabilities"]] for i in (7, 8, 9)] == [
        ["a", "b", "c"], ["bad", "good"], ["a", "s/m"],
    ]  # fmt: skip
    assert found[7]["label"] == "b"
    assert found[7]["loss"] == pytest.approx(-F.log_softmax(torch.tensor([9.0, 0, 0]), 0)[1])
    assert found[8]["probability"] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)


def test_rows_are_encoded_as_those_of_their_own_set(tiny):
    names = ["input_ids", "attention_mask", "token_type_ids"]
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder / "bert", model_input_names=names)
    task = task_of(pairs=["tone"])
    rows = {
        "text": ["the a of in"] * 3,
        "text_pair": [None, "of the", None],
        "label": [0, 4, 5],
        "task": ["verbs", "tone", "size"],
    }
    found = task.encode_rows(tokenizer, rows)
    alone = {
        "verbs": tokenizer(rows["text"][0], truncation=True, max_length=9),
        "tone": tokenizer("the a of in", "of the", truncation=True, max_length=4),
        "size": tokenizer(rows["text"][2], truncation=True, max_length=6),
    }
    for i, name in enumerate(SIZES):
        assert found["input_ids"][i] == alone[name]["input_ids"]
        assert found["token_type_ids"][i] == alone[name]["token_type_ids"]
    assert found["task_ids"] == [0, 1, 2]
    assert found["labels"] == [0, 4, 5]
    whole = task.untruncated().encode_rows(tokenizer, rows)
    encoded_rows = zip(*whole.values(), strict=True)
    cut = [task.is_truncated(dict(zip(whole, row, strict=True))) for row in encoded_rows]
    assert cut == [False, True, False]
    encoded = task.encode(tokenizer, Dataset.from_dict(rows))
    batch = task.collate(tokenizer)([encoded[i] for i in (2, 1)])
    assert batch["task_ids"].tolist() == [2, 1]


def test_a_task_is_read_as_it_was_written(tmp_path):
    task = task_of(pairs=["size"])
    write_task(tmp_path, task)
    assert read_task(tmp_path) == task == pickle.loads(pickle.dumps(task))
    saved = json.loads((tmp_path / FILE).read_text())
    assert saved["tasks"] == [*SIZES]
    assert Counter(name.split("/")[0] for name in saved["classes"]) == SIZES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["verbs", "tone"]}, "tasks"),
        ({"classes": [CLASSES[3], *CLASSES[:3], *CLASSES[4:]]}, "classes"),
        ({"classes": ["verbs", "tone", "size"]}, "TASK/LABEL"),
        ({"limits": [9, 4]}, "limits"),
        ({"limits": [9, 0, 4]}, "limits"),
        ({"max_length": 10}, "max_length"),
        ({"pairs": ["none"]}, "pairs="),
        ({"limits": "abc"}, "limits"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, values, message):
    write_task(tmp_path, task_of())
    saved = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**saved, **values}))
    with pytest.raises(InputError, match=message):
        read_task(tmp_path)
