"""A run starts from a saved adapter: its method, its tensors, and its task head where it fits."""

import pytest
import torch
from training_fixtures import bert_config
from transformers import BertForSequenceClassification

import petl
from petl.config.compose import compose
from petl.config.method_fields import method_fields
from petl.core.auto_classes import write_labels
from petl.core.parameters import trainable
from petl.core.registry import needs_calibration
from petl.runs.checkpoint import save_adapter
from petl.runs.init_from import find_start, method_settings
from petl.runs.settings import TrainConfig
from petl.tasks import Classification
from petl.training.init_from import load_start
from petl.training.wrapping import train_new_modules

pytest_plugins = ["training_fixtures"]
TASK = Classification(classes=["red", "green", "blue"], max_length=16)
OWN = [name for name in petl.list_methods() if petl.method(name).own]
OTHERS = sorted({*petl.list_methods()} - {*OWN})


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
    load_start(model, task, TrainConfig(init_from=str(folder), **settings))
    return model


FIELDS = {
    "increlora": {"rank_pattern": None},
    "binary": {"inner": "lora", "save_format": "latent"},
    "boft": {"boft_block_size": 4},
}


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
