"""Merged models are plain models with the outputs of the adapted model."""

import csv
import shutil
from dataclasses import replace

import pytest
import torch
from export_fixtures import (
    PairAdapter,
    adapted,
    classifier,
    close,
    logits,
    save_stirred,
    tokens,
)
from media_fixtures import VIT, images
from training_fixtures import replace_weights, train
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import petl
from petl.adapters.export.checked_folder import compare, outputs
from petl.adapters.export.lora import export_lora
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find, score
from petl.cli import main
from petl.core.adapter_folder import Folder
from petl.data.models.loading import load_base
from petl.data.tasks.causal_lm import CausalLM
from petl.errors import InputError, RunStopped, UnsupportedError
from petl.experiments.reports.differences import print_difference

pytest_plugins = ["export_fixtures", "media_fixtures", "training_fixtures"]
pytestmark = pytest.mark.usefixtures("pair_method")


def test_a_merged_model_is_a_plain_one_with_the_same_outputs(lora_run, tmp_path):
    written = merge(find(lora_run.path), tmp_path / "out", None)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = tokens()
    close(logits(plain, ids), logits(adapted(lora_run.path), ids))
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert not [key for key in plain.state_dict() if "lora" in key or "modules_to_save" in key]
    assert plain.config.id2label == {0: "beast", 1: "color", 2: "tool"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"][0] == 2
    assert written.difference.same == 1.0
    assert written.difference.effect > 0.01


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "write"), [("lora", merge), ("test_pair", export_lora)])
def test_another_base_of_the_same_shape_is_refused_unless_it_is_asked_for(
    tiny, tmp_path, caplog, method, write
):
    model = shutil.copytree(tiny.folder / "steady", tmp_path / "model")
    base = AutoModelForSequenceClassification.from_pretrained(model)
    saved = find(save_stirred(base, method, tmp_path / "adapter", task_type="SEQ_CLS"))
    write(saved, tmp_path / "out", None)
    if write is export_lora:
        assert Folder(tmp_path / "out").base == Folder(tmp_path / "adapter").base != {}
    replace_weights(model, AutoModelForSequenceClassification)
    with pytest.raises(InputError):
        write(saved, tmp_path / "other", None)
    assert not (tmp_path / "other").exists()
    assert "of 39 tensors" not in caplog.text
    write(replace(saved, other_base=True), tmp_path / "other", None)
    assert (tmp_path / "other").is_dir()
    assert "39 of 39 tensors" in caplog.text


def test_an_adapter_without_effect_is_said_to_merge_into_the_base(tiny, tmp_path, capsys):
    model = petl.wrap(classifier(tiny), "lora", target_modules=["query"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    assert main.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert "the merged model is the base" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_base_with_an_adapter_of_model_adapter_is_named_as_such(tiny, lora_run, tmp_path, capsys):
    below = f"model.adapter={lora_run.path}"
    still = ["train.lr=1e-12", "train.head_lr=1e-12", "train.weight_decay=0"]
    run = train([*tiny.steady, "+method=lora", below, *still], tmp_path / "run")
    assert main.main(["merge", str(run.path), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"the base with {below} merged into it" in told
    first, after = lora_run.scores["after"]["loss"], run.scores["after"]["loss"]
    assert after == pytest.approx(first, abs=1e-5)


def test_a_method_that_cannot_merge_is_refused_and_nothing_is_written(mola_run, tmp_path):
    with pytest.raises(UnsupportedError):
        merge(find(mola_run.path), tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_a_merge_that_changes_outputs_is_refused_and_writes_nothing(tiny, tmp_path, monkeypatch):
    saved = save_stirred(classifier(tiny), "test_pair", tmp_path / "pair", task_type="SEQ_CLS")
    monkeypatch.setattr(PairAdapter, "delta", lambda self: 2 * petl.Adapter.delta(self))
    with pytest.raises(RunStopped) as stopped:
        merge(find(saved), tmp_path / "out", None)
    assert stopped.value.status == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
    merge(find(saved), tmp_path / "out", 100.0)  # explicitly allowed


def test_a_folder_that_is_not_empty_is_never_written_to(lora_run, tmp_path):
    (tmp_path / "kept").write_text("mine")
    for write in (merge, export_lora):
        with pytest.raises(InputError):
            write(find(lora_run.path), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_norms_and_head_of_a_method_without_layers_of_its_own_are_merged(tiny, tmp_path):
    saved = save_stirred(
        classifier(tiny),
        "ln_tuning",
        tmp_path / "norms",
        target_modules=["LayerNorm"],
        task_type="SEQ_CLS",
    )
    merge(find(saved), tmp_path / "out", None)
    ids = tokens()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    close(logits(plain, ids), logits(adapted(saved), ids))


@pytest.mark.thorough
def test_a_run_without_its_data_is_compared_on_random_tokens(tiny, tmp_path, caplog):
    data = tmp_path / "train.csv"
    with data.open("w", newline="") as opened:
        rows = [("the red one", "color"), ("a cat", "beast")] * 6
        csv.writer(opened).writerows([("text", "label"), *rows])
    moved = [f"data.train={data}", f"data.test={data}", "data.allow_overlap=true", "+method=lora"]
    run = train([*tiny.steady, *moved], tmp_path / "run")
    data.unlink()
    with pytest.raises(InputError, match=r"train\.csv"):
        score(find(run.path))
    merge(find(run.path), tmp_path / "out", None)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = tokens()
    close(logits(plain, ids), logits(adapted(run.path), ids))


@pytest.mark.thorough
def test_a_run_on_images_without_its_data_is_compared_on_noise(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    data = shutil.copytree(pictures, tmp_path / "pictures")
    train([*VIT, *images(data), "+method=lora"], tmp_path / "run")
    shutil.rmtree(data)
    saved = find(tmp_path / "run")
    batches = saved.batches()
    assert [batch["pixel_values"].shape for batch in batches] == [(8, 3, 16, 16)] * 4
    again = saved.batches()  # the same after an export
    assert torch.equal(again[-1]["pixel_values"], batches[-1]["pixel_values"])
    written = merge(saved, tmp_path / "out", None)
    assert written.difference.relative < 1e-5 < written.difference.effect


def test_padding_counts_as_no_token_with_the_same_highest_logit():
    def model(sign):
        return lambda input_ids, **_: {"logits": sign * torch.eye(4)[input_ids]}

    # two tokens and two of padding, then four tokens
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"input_ids": torch.tensor([[1, 2, 0, 0], [3, 2, 1, 1]]), "attention_mask": mask}
    given, other = (outputs(model(sign), [batch], "a model") for sign in (1, -1))
    assert compare(given, other, 0.0).same == 0
    assert compare(given, given, 0.0).same == 1
    assert compare(given, other, 0.0).relative == 2  # |x - (-x)| / |x|


@pytest.mark.parametrize("name", ["sentence_embedding", "last_hidden_state"])
def test_of_vectors_the_cosines_are_compared(name, capsys):
    def found(*rows):
        vectors = torch.tensor(rows)
        states = vectors if name == "sentence_embedding" else vectors[:, None]
        mask = torch.ones(len(rows), 1)
        return outputs(lambda **_: {name: states}, [{"attention_mask": mask}], "a model")

    given, longer = found([2.0, 0.0], [0.0, 1.0]), found([3.0, 0.0], [0.0, 3.0])
    turned = found([1.0, 0.0], [3.0, 4.0])
    assert compare(given, longer, 0.0).cosine == 0
    assert compare(given, turned, 0.0).cosine == pytest.approx(0.6)
    print_difference(compare(given, turned, 0.5))
    shown = capsys.readouterr().out
    assert "cosines of texts by 6.0e-01" in shown
    assert "logit" not in shown


@pytest.mark.thorough
def test_a_bf16_base_merges_within_its_own_tolerance_and_exactly_in_float32(tiny, tmp_path):
    run = train([*tiny.steady, "+method=lora", "model.dtype=bfloat16"], tmp_path / "run")
    written = merge(find(run.path), tmp_path / "out", None)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.dtype == torch.bfloat16
    assert 0 < written.difference.relative < 2e-2
    exact = merge(find(run.path).in_dtype("float32"), tmp_path / "exact", None)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exact", dtype="auto")
    assert plain.dtype == torch.float32
    assert exact.difference.relative < 1e-5


@pytest.mark.thorough
def test_a_language_model_is_scored_and_merged(tiny, tmp_path):
    run = train([*tiny.complete, "+method=lora"], tmp_path / "run")
    assert score(find(run.path)) == pytest.approx(run.scores["after"], abs=1e-6)
    merge(find(run.path), tmp_path / "out", None)
    settings = {"name": "out", "source": "path", "path": str(tmp_path / "out")}
    ids = tokens()
    close(logits(load_base(settings, CausalLM(max_length=16)), ids), logits(adapted(run.path), ids))
