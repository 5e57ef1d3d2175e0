"""Rare classes: weights in the loss, and rows drawn so that all classes are equally many."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from training_fixtures import train

import petl
from petl.data.batch_sampler import StepSampler
from petl.data.task_mixture import TaskMixture
from petl.data.tasks.classification import Classification
from petl.data.tasks.multi_label import MultiLabel
from petl.errors import InputError
from petl.testing import tiny_bert
from petl.training.features.class_weights import balanced, weigh

pytest_plugins = ["task_fixtures", "training_fixtures"]


def batch(labels):
    return {"input_ids": torch.arange(6 * len(labels)).view(-1, 6) % 50, "labels": labels}


def test_the_loss_is_the_mean_of_weighted_terms():
    model, weights = tiny_bert().eval(), torch.tensor([0.5, 3.0, 1.0, 0.0, 2.0])
    given = batch(torch.tensor([0, 1, 1, 4, 2, 3]))
    logits = model(**given).logits.detach().double()
    weigh(model, weights, several=False)
    outputs = model(**given)
    terms = [
        -float(weights[label]) * (row[label] - torch.logsumexp(row, 0))
        for row, label in zip(logits, given["labels"], strict=True)
    ]
    assert outputs.loss.item() == pytest.approx(float(sum(terms)) / 6, rel=1e-5)
    # micro-batches weighted by their rows give the gradient of the whole batch
    outputs.loss.backward()
    whole = model.classifier.weight.grad.clone()
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 6)):
        own = {name: values[part] for name, values in given.items()}
        (model(**own).loss * len(own["labels"]) / 6).backward()
    assert torch.allclose(model.classifier.weight.grad, whole, atol=1e-6)


def test_an_auxiliary_loss_is_added_to_the_weighted_one():
    wrapped = petl.wrap(
        tiny_bert(), "mola", r=2, num_experts=4, router_aux_loss_coef=1.0, task_type="SEQ_CLS"
    )
    given = batch(torch.tensor([0, 1, 1, 4, 2, 3]))
    weights = torch.zeros(5)
    weigh(wrapped.get_base_model(), weights, several=False)
    loss = wrapped.train()(**given).loss.item()
    aux = petl.lifecycle(wrapped).aux_loss().item()
    assert loss == pytest.approx(aux, rel=1e-6)  # all weights are 0
    assert aux > 0.1


def test_the_loss_of_several_classes_weighs_labels_that_have_one():
    model, weights = tiny_bert().eval(), torch.tensor([4.0, 1.0, 0.5, 2.0, 1.0])
    model.config.problem_type = "multi_label_classification"
    labels = (torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    p = model(**batch(labels)).logits.detach().double().sigmoid()
    weigh(model, weights, several=True)
    expected = -(weights * labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert model(**batch(labels)).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_balanced_weights_make_classes_count_alike():
    labels = [0] * 6 + [2] * 3 + [1]
    found = balanced(Classification(["a", "b", "c", "none"]), Dataset.from_dict({"labels": labels}))
    assert found == [pytest.approx(w) for w in (10 / 24, 10 / 4, 10 / 12, 1.0)]
    several = [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert balanced(MultiLabel(["a", "b"]), Dataset.from_dict({"labels": several})) == [
        pytest.approx(1 / 3),
        3.0,
    ]


def test_balanced_rows_have_all_classes_equally_often():
    labels = [0] * 90 + [1] * 9 + [2]
    mixture = TaskMixture.of_temperature(labels, 3, np.inf)
    sampler = StepSampler(
        rows=100, batch_size=10, micro_batch_size=None, steps=30, seed=1, mixture=mixture
    )
    counts = Counter(labels[row] for part in sampler for row in part)
    assert sum(counts.values()) == 300
    assert all(abs(count - 100) <= 2 for count in counts.values())


@pytest.fixture(scope="module")
def rare(tiny, tmp_path_factory):
    """Words of a run on rows of which one class is rare."""
    folder = tmp_path_factory.mktemp("rare")
    header, *lines = (tiny.folder / "train.csv").read_text().splitlines()
    label = lines[0].rpartition(",")[2]
    first = [line for line in lines if line.endswith(f",{label}")]
    others = [line for line in lines if not line.endswith(f",{label}")]
    (folder / "train.csv").write_text("\n".join([header, *first[:2], *others]))
    return [*tiny.steady, f"data.train={folder}/train.csv", "+method=lora"], label


def test_a_run_with_weights_learns_another_adapter_and_says_them(rare, tmp_path, petl_log):
    words, label = rare
    plain = train([*words, "train.steps=2"], tmp_path / "plain")
    run = train([*words, "train.steps=2", "train.class_weights=balanced"], tmp_path / "balanced")
    weights = run.scores["class_weights"]
    assert max(weights, key=weights.get) == label
    assert f"weights of classes in the loss: {label}" in petl_log.text
    assert run.metrics[0]["loss"] != plain.metrics[0]["loss"]
    given = "{" + ",".join(f"{name}:{weight}" for name, weight in weights.items()) + "}"
    same = train([*words, "train.steps=2", f"train.class_weights={given}"], tmp_path / "given")
    assert same.metrics[0]["loss"] == pytest.approx(run.metrics[0]["loss"], rel=1e-4)


@pytest.mark.thorough
def test_a_run_with_balanced_rows_reads_the_rare_class_more_often(rare, tmp_path):
    words, _ = rare
    run = train([*words, "train.steps=4", "data.sampling=balanced"], tmp_path / "run")
    plain = train([*words, "train.steps=4"], tmp_path / "plain")
    assert run.scores["tokens"] != plain.scores["tokens"]
    assert run.metrics[0]["loss"] != plain.metrics[0]["loss"]


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["token_classification", "multi_label"])
def test_other_tasks_with_classes_have_weights(families, tmp_path, task):
    words = families(task, "+method=lora", "train.steps=1", "train.eval_steps=null")
    words = [word for word in words if not word.startswith("train.validation_share")]
    plain = train(words, tmp_path / "plain")
    run = train([*words, "train.class_weights=balanced"], tmp_path / "run")
    assert run.metrics[0]["loss"] != plain.metrics[0]["loss"]
    assert {*run.scores["class_weights"]} == {*json.loads(
        (run.path / "adapter/task.json").read_text())["classes"]}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["train.class_weights={nonsense: 2}"], "'nonsense'"),
        (["data.sampling=balanced", "data.streaming=true", "train.steps=2"], "data.streaming"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(rare, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("petl.cli.train.load_base", None)  # refused before a model is loaded
    with pytest.raises((InputError, ValueError), match=message):
        train([*rare[0], *more], tmp_path / "run")
