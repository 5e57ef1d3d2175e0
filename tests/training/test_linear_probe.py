"""The score that an adapter has to beat."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from torch import nn
from training_fixtures import bert_config, llama_config
from transformers import (
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import petl
from petl.data.base import read_data
from petl.data.models.loading import load_base, load_tokenizer
from petl.data.tasks import SET
from petl.training.compose import compose
from petl.training.dataloader import encode_splits
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator
from petl.training.linear_probe import (
    BaselineScores,
    HeadReader,
    features,
    find_head,
    in_order,
    linear_probe,
)
from petl.training.runs.run_config import read_config

pytest_plugins = ["training_fixtures"]


@pytest.fixture
def parts(tiny):
    return parts_of(tiny)


def parts_of(tiny, *words):
    """The model, rows, settings and Accelerator of a run."""
    cfg = compose([*tiny.classify, "+method=lora", "train.epochs=2", "train.steps=null", *words])
    cfg.train.linear_probe = True
    settings = read_config(cfg).train
    accelerator = start(settings.seed, "no")
    data = read_data(cfg.data)
    splits = encode_splits(data, load_tokenizer(cfg.model), settings, accelerator)
    model = petl.wrap(
        load_base(cfg.model, data.task), "lora", task_type="SEQ_CLS", target_modules="all-linear"
    )
    return model, splits, settings, accelerator


def reader_of(base, splits, accelerator, **fields):
    return HeadReader(base, find_head(base), splits.task, accelerator, **fields)


def logits_of(model, splits, rows):
    model.eval()
    with torch.no_grad():
        return torch.cat(
            [
                model(**{k: v for k, v in splits.collate([row]).items() if k != "labels"}).logits
                for row in rows
            ]
        )


def test_features_are_what_the_head_reads_row_by_row(parts):
    model, splits, _, accelerator = parts
    base = model.get_base_model()
    found = features(reader_of(base, splits, accelerator), splits, splits.test)
    assert found.labels["labels"].tolist() == list(splits.test["labels"])
    expected = logits_of(base, splits, splits.test)
    torch.testing.assert_close(find_head(base)(found.x), expected, atol=1e-5, rtol=1e-5)


def classifier(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = llama_config()
        config.num_labels = 3
        return LlamaForSequenceClassification(config)
    if kind == "roberta":  # its head itself picks the first token, and has a layer of its own
        fields = bert_config().to_dict() | {"num_labels": 3, "pad_token_id": 0, "model_type": None}
        fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
        return RobertaForSequenceClassification(RobertaConfig(**fields))
    config = bert_config()
    config.num_labels = 3
    model = BertForSequenceClassification(config)
    if kind == "resnet":  # the head gets [B, H, 1, 1] from the pooling
        model.dropout = nn.Unflatten(1, (config.hidden_size, 1, 1))
        model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(config.hidden_size, 3))
    return model


@pytest.mark.parametrize("kind", ["bert", "llama", "roberta", "resnet"])
def test_heads_of_every_shape_are_served(parts, kind):
    _, splits, _, accelerator = parts
    base = classifier(kind).eval()
    head = find_head(base)
    vectors = features(reader_of(base, splits, accelerator), splits, splits.test).x
    expected = logits_of(base, splits, splits.test)
    torch.testing.assert_close(head(vectors), expected, atol=1e-4, rtol=1e-4)


def test_of_tokens_with_equal_scores_in_bf16_it_is_the_one_that_the_model_reads():
    torch.manual_seed(0)
    config = llama_config()
    config.num_labels, config.pad_token_id = 1, 0
    model = LlamaForSequenceClassification(config).eval()
    ids = torch.randint(1, config.vocab_size, (32, 100))
    mask = torch.ones_like(ids)
    mask[::2, 90:] = ids[::2, 90:] = 0  # padding on the right of some
    task = SimpleNamespace(head_logits=lambda outputs: outputs.logits)
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    reader = HeadReader(model, model.score, task, accelerator)
    with torch.no_grad():
        found, _ = reader.first({"input_ids": ids, "attention_mask": mask})
        with accelerator.autocast():
            states = model.model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, states[torch.arange(32), mask.sum(1) - 1], atol=0, rtol=0)


def test_logits_that_the_head_alone_does_not_make_are_left_out_with_the_reason(
    parts, monkeypatch, petl_log
):
    model, splits, settings, accelerator = parts
    kind = type(model.get_base_model())
    original = kind.forward

    def shifted(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits + 1.0
        return output

    monkeypatch.setattr(kind, "forward", shifted)
    assert linear_probe(model, splits, settings, accelerator) is None
    assert "no linear probe" in petl_log.text


@pytest.mark.thorough
def test_the_head_alone_does_about_as_well_as_logistic_regression(tiny):
    model, splits, settings, accelerator = parts_of(tiny, "train.epochs=20")
    base = model.get_base_model()
    train, test = (
        features(reader_of(base, splits, accelerator), splits, rows)
        for rows in (splits.train, splits.test)
    )
    reference = LogisticRegression(C=100.0, max_iter=2000)
    reference.fit(train.x.numpy(), train.labels["labels"].numpy())
    expected = reference.score(test.x.numpy(), test.labels["labels"].numpy())
    found = linear_probe(model, splits, settings, accelerator)
    assert found["accuracy"] >= expected - 0.15  # three test rows of twenty


def test_the_head_has_the_steps_of_the_run_also_under_max_tokens(tiny, petl_log):
    words = ["train.buckets=auto", "train.max_tokens=50"]
    model, splits, settings, accelerator = parts_of(tiny, *words)
    steps = splits.sampler(settings).steps
    assert steps > 2 * -(-len(splits.train) // settings.batch_size)
    linear_probe(model, splits, settings, accelerator)
    # at five learning rates, then at the best one
    assert f"linear probe: training the head: {6 * steps} steps" in petl_log.messages


def test_a_rate_of_lora_b_is_none_of_the_head(parts):
    model, splits, settings, accelerator = parts
    plain = linear_probe(model, splits, settings, accelerator)
    plus = linear_probe(model, splits, replace(settings, loraplus_ratio=4.0), accelerator)
    assert plus == plain


def test_the_model_and_the_random_state_stay_as_they_were(parts):
    model, splits, settings, accelerator = parts
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    linear_probe(model, splits, settings, accelerator)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_it_measures_the_frozen_model_not_the_adapted_one(parts):
    model, splits, settings, accelerator = parts
    expected = linear_probe(model, splits, settings, accelerator)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert linear_probe(model, splits, settings, accelerator) == expected


@pytest.mark.parametrize(("precision", "size"), [("no", 64), ("bf16", 64), ("no", 2)])
def test_its_pass_scores_the_untrained_model(parts, monkeypatch, precision, size):
    model, splits, settings, _ = parts
    settings = replace(settings, eval_batch_size=size)
    accelerator = start(settings.seed, precision)
    untrained = BaselineScores()
    expected = Evaluator(model, splits, accelerator, size).rows(splits.test)
    linear_probe(model, splits, settings, accelerator, untrained)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "rows", None)  # no other pass is made
        found = Evaluator(model, splits, accelerator, size).test(known=untrained.scores_of)
    assert found == expected
    assert found["rows"] == len(splits.test) > 2
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert untrained.scores_of(model, splits.task, accelerator) is None
    assert Evaluator(model, splits, accelerator, size).test(known=untrained.scores_of) != expected


def test_a_row_that_several_processes_compute_is_scored_once(parts):
    _, splits, _, accelerator = parts
    batch = splits.collate([splits.test[i] for i in (0, 1, 2)])
    logits = torch.randn(3, 3)
    untrained = BaselineScores()
    untrained.add(splits.task, batch, logits, 2)  # the third one is another process's
    untrained.add(splits.task, batch, logits, 0)
    untrained.end(splits.task, splits.test, [], accelerator)
    assert untrained.scores["rows"] == 2
    losses = torch.nn.functional.cross_entropy(logits[:2], batch["labels"][:2])
    assert untrained.scores["loss"] == pytest.approx(float(losses), rel=1e-6)


def test_each_set_has_the_scores_of_its_rows(parts):
    _, splits, _, accelerator = parts
    batch = splits.collate([splits.test[i] for i in (0, 1, 2)])
    logits = torch.randn(3, 3)
    rows = Dataset.from_dict({SET: [0, 2, 2]})
    untrained = BaselineScores(("one", "none", "two"))
    untrained.add(splits.task, batch, logits, 3, [2, 0, 2])
    untrained.end(splits.task, rows, [], accelerator)
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    assert untrained.scores["one_loss"] == pytest.approx(float(losses[1]), rel=1e-6)
    assert untrained.scores["two_loss"] == pytest.approx(float(losses[[0, 2]].mean()), rel=1e-6)
    assert untrained.scores["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert "none_loss" not in untrained.scores


def test_an_adapter_that_was_trained_before_is_scored_itself(parts):
    model, splits, settings, accelerator = parts
    untrained = BaselineScores()
    settings = replace(settings, init_from="runs/earlier")
    linear_probe(model, splits, settings, accelerator, untrained)
    assert untrained.scores is None


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rows_computed_by_several_processes_come_back_in_order(processes):
    order = [4, 2, 0, 3, 1, 5, 6]
    each = -(-len(order) // processes)
    sent = []
    for p in range(processes):
        mine = order[p::processes]
        sent += mine + order[: each - len(mine)]
    assert in_order(torch.tensor(sent), order, processes).tolist() == list(range(7))
