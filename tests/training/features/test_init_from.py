"""A run starts from a saved adapter: its method, its tensors, and its task head where it fits."""

import json

import pytest
import torch
from contract_cases import adaptable
from training_fixtures import bert_config, train
from transformers import BertForSequenceClassification

import petl
from petl.adapters.deltas import compress_adapter, expand
from petl.core.parameters import trainable
from petl.core.registry import needs_calibration
from petl.data.tasks.base import write_labels
from petl.data.tasks.classification import Classification
from petl.errors import InputError
from petl.experiments.planning.plan import plan_run
from petl.experiments.planning.preview import preview
from petl.training.compose import compose
from petl.training.features.init_from import find_start, load_start, method_settings
from petl.training.runs.checkpoint import save_adapter
from petl.training.runs.config import method_fields
from petl.training.runs.run_config import read_config
from petl.training.runs.settings import TrainConfig
from petl.training.wrapping import train_new_modules

pytest_plugins = ["training_fixtures"]
PISSA = "++method.init_lora_weights=pissa"
TASK = Classification(classes=["red", "green", "blue"], max_length=16)
OWN = [name for name in adaptable("bert") if petl.method(name).own]
OTHERS = sorted({*adaptable("bert")} - {*OWN})


def new_base():
    torch.manual_seed(0)
    config = bert_config()
    for key, value in TASK.model_kwargs().items():
        setattr(config, key, value)
    base = BertForSequenceClassification(config).eval()
    base.petl_new_modules = ["classifier"]
    return base


def inputs():
    ids = torch.arange(24).view(3, 8) % 10 + 4
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs()).logits


def wrapped(settings):
    """A new adapter of these settings, with a head that trains."""
    fields = method_fields(settings, "SEQ_CLS", 40)
    base = new_base()
    calibration = [inputs()] if needs_calibration(petl.build_config(**fields)) else None
    return petl.wrap(base, **train_new_modules(fields, base), calibration=calibration)


def saved(settings, folder):
    """An adapter with other values than at its start, in a folder; returns its logits."""
    model = wrapped(settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, tensor in trainable(model):
            tensor.add_(0.1 * torch.randn_like(tensor))
    outputs = logits(model)
    save_adapter(model, folder)
    write_labels(folder, TASK.model_kwargs())
    return outputs


def started(folder, task=TASK, **settings):
    model = wrapped(method_settings(find_start(str(folder)), None))
    load_start(model, find_start(str(folder)), task, TrainConfig(init_from=str(folder), **settings))
    return model


FIELDS = {
    "adalora": {"tinit": 5, "tfinal": 10},
    "icv": {"train": True, "pairs": "null", "scale": "plain", "keep_norm": False},
    "mos": {"r": 4},
    "polyhistor": {"tasks": ["only"]},
    "binary": {"inner": "lora", "save_format": "latent"},
    "c3a": {"block_size": 16},
    "oft": {"oft_block_size": 16},
    "vblora": {"vector_length": 16},
}


@pytest.mark.cells(4)
@pytest.mark.parametrize(
    "name",
    [
        *OWN,
        "lora",
        "dora",
        *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS if n not in ("lora", "dora")),
    ],
)
def test_every_method_starts_with_the_outputs_of_the_saved_adapter(tmp_path, name):
    settings = compose(
        [f"+method={name}", *(f"method.{k}={v}" for k, v in FIELDS.get(name, {}).items())]
    ).method
    expected = saved(settings, tmp_path / "saved")
    model = started(tmp_path / "saved")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    loss = model.train()(**inputs(), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() for _, p in trainable(model))


def test_a_compressed_adapter_is_trained_further_from_its_values(tmp_path):
    saved(compose(["+method=lora"]).method, tmp_path / "saved")
    compress_adapter(tmp_path / "saved", tmp_path / "small", density=0.5)
    expand(tmp_path / "small", tmp_path / "plain")
    model, plain = (started(tmp_path / name) for name in ("small", "plain"))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
    assert not torch.equal(logits(model), logits(started(tmp_path / "saved")))


def test_what_is_trained_further_is_the_grown_ranks(tmp_path):
    ranks = {"bert.encoder.layer.0.attention.self.query": 3}
    settings = {"name": "increlora", "target_modules": ["query"], "rank_pattern": ranks}
    expected = saved(settings, tmp_path / "saved")
    model = started(tmp_path / "saved")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.thorough
def test_of_a_packed_adapter_training_starts_at_its_codes_and_says_so(tmp_path, recwarn):
    expected = saved({"name": "binary", "inner": "lora"}, tmp_path / "saved")
    model = started(tmp_path / "saved")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-3)
    assert any("codes but no latent weights" in str(w.message) for w in recwarn)


# Fields


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA of rank 4, not to be changed."""
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    saved({"name": "lora", "r": 4, "target_modules": ["query"]}, folder)
    return folder


def test_the_fields_are_those_of_the_adapter_without_a_method(adapter):
    settings = method_settings(find_start(str(adapter)), None)
    assert (settings["name"], settings["r"], settings["target_modules"]) == ("lora", 4, ["query"])
    assert method_settings(find_start(str(adapter)), compose(["+method=lora"]).method) == settings


def test_dropout_may_differ(adapter):
    given = {"name": "lora", "lora_dropout": 0.3}
    assert method_settings(find_start(str(adapter)), given)["lora_dropout"] == 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+method=mola"], "method lora, .*mola"),
        (["+method=lora", "method.r=16"], "r=4, .*method.r=16"),
        (
            ["+method=lora", PISSA],
            "has init_lora_weights=True, and method.init_lora_weights='pissa'",
        ),
        (["train.budget=1000"], "train.budget"),
    ],
)
def test_contradictions_are_refused(tiny, adapter, words, message):
    with pytest.raises(InputError, match=message):
        read_config(compose([*tiny.classify, *words, f"train.init_from={adapter}"]))


def test_an_adapter_relative_to_changed_base_weights_is_refused(tmp_path, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "init_lora_weights": "olora"})
    )
    with pytest.raises(InputError, match="'olora'"):
        method_settings(find_start(str(tmp_path)), None)


# Tensors and head


def head_of(model):
    return model.get_base_model().classifier.modules_to_save.default.weight.detach().clone()


def with_labels(*labels):
    return Classification(classes=list(labels), max_length=16)


@pytest.mark.parametrize(
    ("task", "choice", "kept", "line"),
    [
        (TASK, None, True, "the task head is kept"),
        (TASK, "new", False, "the task head is new (train.init_head=new)"),
        (with_labels("a", "b", "c"), None, False, "since the labels are a, b, c, and there red"),
        (with_labels("a", "b", "c"), "keep", True, "the task head is kept"),
    ],
)
def test_the_head_is_kept_for_the_same_labels(adapter, petl_log, task, choice, kept, line):
    model = started(adapter, task, init_head=choice)
    other = wrapped(method_settings(find_start(str(adapter)), None))
    assert torch.equal(head_of(model), head_of(other)) is not kept
    assert any(line in message for message in petl_log.messages)


def test_a_head_of_unknown_labels_needs_a_choice(adapter, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(InputError):
        started(tmp_path)
    started(tmp_path, init_head="keep")


def test_a_head_of_other_shapes_cannot_be_kept(adapter, monkeypatch):
    monkeypatch.setitem(globals(), "TASK", with_labels("a", "b"))
    assert head_of(started(adapter, TASK)).shape[0] == 2
    with pytest.raises(InputError):
        started(adapter, TASK, init_head="keep")


def test_other_base_weights_are_refused_or_warned_of(adapter, monkeypatch, petl_log):
    original = new_base

    def other():
        base = original()
        base.bert.embeddings.word_embeddings.weight.data += 1
        return base

    monkeypatch.setitem(globals(), "new_base", other)
    with pytest.raises(InputError):
        started(adapter)
    started(adapter, other_base=True)
    assert any("its outputs may be wrong" in message for message in petl_log.messages)


# Whole runs


@pytest.mark.thorough
def test_a_run_starts_from_a_run_with_other_data(tiny, tmp_path, petl_log):
    common = [*tiny.steady, "train.lr=1e-2", "train.log_steps=1"]
    first = train([*common, "+method=mola", "method.r=3"], tmp_path / "first")
    start = f"train.init_from={tmp_path / 'first'}"
    second = train([*common, start, "data.train_rows=30"], tmp_path / "second")
    assert second.scores["before"] == pytest.approx(first.scores["after"], rel=1e-5)
    assert json.loads((tmp_path / "second" / "environment.json").read_text())["init_from"]
    card = (tmp_path / "second" / "adapter" / "README.md").read_text()
    assert "- started from the adapter of: first" in card
    # what it continues is found again by its own configuration
    again = train(
        [
            *common,
            start,
            "data.train_rows=30",
            "train.steps=6",
            f"train.resume={tmp_path / 'second'}",
        ],
        tmp_path / "second",
    )
    assert again.scores["steps"] == 6
    assert "first" in (tmp_path / "second" / "report.html").read_text()
    planned = plan_run(compose([*common, start]))
    assert planned.names[0] == "mola"
    assert planned.saved == sum(t.numel() for t in first.adapter.values())
    assert preview(compose([*common, start]))


@pytest.mark.thorough
def test_a_run_of_pissa_is_trained_further_as_the_lora_that_it_saved(tiny, tmp_path):
    common = [*tiny.steady, "train.lr=1e-2"]
    first = train([*common, "+method=lora", PISSA, "method.r=2"], tmp_path / "first")
    second = train([*common, f"train.init_from={tmp_path / 'first'}"], tmp_path / "second")
    assert second.scores["before"] == pytest.approx(first.scores["after"], rel=1e-4)
    assert "name: lora" in (tmp_path / "second" / "config.yaml").read_text()
    third = train([*common, f"train.init_from={tmp_path / 'second'}"], tmp_path / "third")
    assert third.scores["before"] == pytest.approx(second.scores["after"], rel=1e-4)


@pytest.mark.thorough
def test_an_adapter_of_a_language_model_starts_a_classifier(tiny, tmp_path, petl_log):
    first = train([*tiny.complete, "+method=lora"], tmp_path / "first")
    words = [word for word in tiny.complete if not word.startswith("data.task=")]
    start = [f"train.init_from={first.path}", "model.name=path"]
    train([*words, *start], tmp_path / "second")
    assert any("the task head is new, since that adapter has none" in m for m in petl_log.messages)


@pytest.mark.thorough
def test_a_run_on_another_model_is_refused_by_its_name(tiny, tmp_path):
    first = train([*tiny.steady, "+method=lora"], tmp_path / "first")
    with pytest.raises(InputError, match="minilm"):
        read_config(compose(["model=minilm", f"train.init_from={first.path}"]))
