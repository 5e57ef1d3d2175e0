"""Runs of train.py with quantized base models."""

from importlib.util import find_spec

import pytest
import torch
from training_fixtures import train

from petl.adapters.export import saved_adapter
from petl.adapters.export.lora import export_lora
from petl.adapters.export.merge import merge
from petl.core.adapter_folder import Folder
from petl.data.models.sources import PACKAGES, read_source
from petl.errors import InputError
from petl.training.compose import compose

pytest_plugins = ["training_fixtures"]
LACKING = any(find_spec(package) is None for package in PACKAGES.values())
installed = pytest.mark.skipif(LACKING, reason="pip install 'petl-peft[quantized]'")


@installed
@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKAGES)
def test_a_run_with_a_quantized_base_trains_reloads_and_merges(tiny, tmp_path, petl_log, kind):
    common = [*tiny.steady, "+method=lora", f"model.quantization={kind}", "train.lr=1e-2"]
    common += ["train.steps=20", "train.eval_steps=10", "train.log_steps=5"]
    run = train(common, tmp_path / "run")
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert losses[-1] < losses[0]
    found = saved_adapter.find(run.path)
    model = found.model()
    base = model.get_base_model()
    assert type(base.bert.encoder.layer[0].attention.self.query.base_layer.weight) is not (
        torch.nn.Parameter
    )
    assert isinstance(base.classifier.original_module, torch.nn.Linear)
    assert base.classifier.original_module.weight.dtype == torch.float32
    assert saved_adapter.score(found) == pytest.approx(run.scores["after"], abs=1e-6)
    merged = merge(found, tmp_path / "merged", None)
    assert merged.difference.relative < 1e-4
    assert "merging into the dequantized base model" in petl_log.text
    # the tensors that are not quantized are those of the dequantized base
    assert "bert.embeddings.word_embeddings.weight" in Folder(run.path / "adapter").base
    assert "the base model's weights differ" not in petl_log.text
    assert export_lora(found, tmp_path / "lora", None).folder == tmp_path / "lora"


@installed
@pytest.mark.slow
def test_a_method_that_needs_dense_weights_is_refused_before_training(tiny, tmp_path):
    common = [*tiny.steady, "+method=corda", "model.quantization=bnb_4bit", "method.r=2"]
    with pytest.raises(InputError):
        train(common, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_quantization_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr("petl.system.imports.extras.find_spec", lambda package: None)
    cfg = compose(["+method=lora", "model.quantization=torchao_int8"])
    with pytest.raises(InputError, match=r"torchao.*\[quantized\]"):
        read_source(cfg.model)


def test_random_weights_are_not_quantized(monkeypatch):
    monkeypatch.setattr("petl.data.models.sources.need_extra", lambda *_: None)
    cfg = compose(["+method=lora", "model=vit_random", "+model.quantization=bnb_4bit"])
    with pytest.raises(InputError):
        read_source(cfg.model)
