"""Combinations of methods, quantization and density loss train, or raise with a reason."""

from itertools import product
from typing import Any

import pytest
import torch
from contract_cases import models_of
from peft import PeftModel
from safetensors.torch import load_file

import petl
from petl import testing
from petl.core.adapter_file import WEIGHTS
from petl.core.registry import needs_calibration
from petl.errors import InputError
from petl.methods import losses
from petl.system.settings.command_line import preset_of
from petl.testing.training import train
from petl.training.compose import compose
from petl.training.runs.config import method_fields
from petl.training.runs.run_config import read_config

STEPS, RATE = 10, 2e-2  # sparse chooses after five
# alone, methods are tried by the contract
COMBINATIONS = ("density", "binary", "binary and density")
WIDE = {"name": "density", "eps": 1e-2}  # so wide that the activations of random models change it

# Combinations that must raise before training, with their message. All others must train.
NO_MATRIX = "trains no tensor of two or more dimensions"
REFUSED = {
    "density": {
        "adalora": "PEFT's AdaLoraModel calls model.forward and so bypasses its forward hooks",
        "dkvb": "it reads the blocks alone, and the head behind them",
        "scedit": "no activation module found in the MLP blocks of TinyUNet",
    },
    "binary": {
        "adalora": "it prunes by setting values to zero",
        "binary": "its weights are quantized already",
        "corda": "it subtracts the initial update from the base weights",
        "delora": "it normalizes its factors",
        "fourierft": NO_MATRIX,
        "dsee": "it prunes base weights by its update",
        "icv": f"{NO_MATRIX}|trains nothing",
        "increlora": "its file has the active ranks only",
        "pst": "it ranks base weights by scores",
        "ln_tuning": NO_MATRIX,
        "pela": "its factors stand in place of the weights",
        "shira": NO_MATRIX,
        "sparse": NO_MATRIX,
        "vblora": "it ranks its logits to choose vectors",
        "vera": NO_MATRIX,
        "pyra": "it has an inner method of its own",
        "dkvb": "rounding moves values that no row picked",
    },
}
REFUSED["binary and density"] = REFUSED["density"] | REFUSED["binary"]

# Values for fields whose YAML values are too large for width 64 and two or three blocks.
SMALLER: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 200},
    "boft": {"boft_block_size": 8},
    "c3a": {"block_size": 16},
    "compacter": {"r": 8},
    "corda": {"r": 4, "lora_alpha": 4},
    "icv": {"train": True, "pairs": None, "scale": "plain", "keep_norm": False},
    "increlora": {"total_step": 200},
    "mola": {"num_experts": 2},
    "mos": {"r": 3, "equivalent_rank": 3},
    "oft": {"oft_block_size": 16},
    "pyra": {"schedule": [2, 0]},
    "polyhistor": {"r": 8, "tasks": ["only"]},
    "randlora": {"r": 8},
    "dkvb": {"codebooks": 16, "pairs": 8},
    "sherl": {"r": 16},  # with width / 8 and this seed, no block's score is positive
    "sparse": {"total_step": 200},
    "vblora": {"vector_length": 16},
    "vera": {"r": 16},
}

OWN = [name for name in petl.list_methods() if petl.method(name).own]
SAMPLE = {*OWN, "lora", "ia3", "adalora", "vblora", "oft"}  # the others are slow tests
QUICK = {*OWN, "lora"}  # of these


def params() -> list:
    """Yield each method, combination and model.

    In the default run petl's methods and LoRA have the largest combination that is not refused, and
    are refused the others; in the thorough one a sample has all of them, and the largest on BERT.
    """
    found = []
    for method, combination in product(petl.list_methods(), COMBINATIONS):
        models = [m for m in ("llama", "bert") if m in models_of(method)] or models_of(method)
        for model in models:
            allowed = [c for c in COMBINATIONS if method not in REFUSED[c]]
            largest = combination not in allowed or combination == allowed[-1]
            mark = pytest.mark.thorough if method in SAMPLE else pytest.mark.slow
            quick = method in QUICK and largest and model != "bert"
            if method in SAMPLE and model == "bert" and combination != COMBINATIONS[-1]:
                mark = pytest.mark.slow
            found.append(pytest.param(method, combination, model, marks=[] if quick else mark))
    return found


def composed(tiny: testing.TinyModel, method: str, combination: str) -> PeftModel:
    """Return what train.py builds from the YAMLs, on a tiny model."""
    torch.manual_seed(1)
    settings = {"name": method, **preset_of(method)}
    if "binary" in combination:
        settings = {**preset_of("binary"), "inner": method}
    settings |= SMALLER.get(method, {})
    fields = method_fields(settings, tiny.task_type, total_steps=STEPS)
    calibration = [tiny.batch(seed=9)] if needs_calibration(petl.build_config(**fields)) else None
    model = petl.wrap(tiny.base(), calibration=calibration, **fields)
    losses.attach(model, losses.read(WIDE if "density" in combination else None))
    return model.train()


@pytest.mark.cells(6)
@pytest.mark.parametrize(("method", "combination", "model"), params())
def test_combinations_train_save_and_load_or_raise_with_a_reason(
    method, combination, model, tmp_path
):
    tiny = (testing.TINY_MODELS | testing.OTHER_MODELS)[model]
    reason = REFUSED.get(combination, {}).get(method)
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            composed(tiny, method, combination)
        return
    trained, batch = composed(tiny, method, combination), tiny.batch()
    before = {name: p.detach().clone() for name, p in testing.trainable(trained).items()}
    seen = train(trained, batch, steps=STEPS, lr=RATE).losses
    assert seen[-1] < seen[0]
    assert not [n for n, p in testing.trainable(trained).items() if torch.equal(p, before[n])]
    if "density" in combination:
        assert_density_counts(trained, batch)

    # T5 shifts the labels to get the decoder's inputs
    inputs = {k: tensor for k, tensor in batch.items() if k != "labels" or model == "t5"}
    expected = testing.logits(trained, inputs)
    assert testing.difference(expected, testing.logits(tiny.base(), inputs)) > 1e-4
    assert_drawn(trained)  # which changes nothing that is saved
    trained.save_pretrained(tmp_path)
    loaded = petl.load(tiny.base(), tmp_path, adapter_name="other")
    torch.testing.assert_close(testing.logits(loaded, inputs), expected, atol=2e-5, rtol=0)
    packed = [k for k in load_file(tmp_path / WEIGHTS) if k.endswith(".codes")]
    assert bool(packed) == (method == "binary" or "binary" in combination)


def assert_drawn(model: PeftModel) -> None:
    """There is a map of what the method did, whatever the method, and it has numbers."""
    maps = petl.lifecycle(model).heat_maps()
    assert maps
    assert len({each.name for each in maps}) == len(maps)
    for each in maps:
        assert each.top > 0, each.name
        assert [len(row) for row in each.cells] == [len(each.columns)] * len(each.rows)


def assert_density_counts(model: PeftModel, batch: testing.models.Batch) -> None:
    """The term has a value and contributes to the gradient."""
    life, found = petl.lifecycle(model), []
    for life.aux_weight in (1.0, 0.0):
        torch.manual_seed(0)  # of dropout
        found.append(testing.gradients(model, batch))
    assert 0 < life.metrics()["density_loss"] < 1
    with_term, task = found
    assert any(testing.difference(g, task[name]) > 0 for name, g in with_term.items())


@pytest.mark.parametrize("inner", petl.list_methods())
def test_binary_over_a_method_composes_with_density_on_the_command_line(inner):
    cfg = compose(["+method=binary", f"method.inner={inner}", "+loss=density"])
    reason = REFUSED["binary"].get(inner, NO_MATRIX)
    if reason != NO_MATRIX:  # which depends on the model
        with pytest.raises(InputError, match=reason):
            read_config(cfg)
        return
    assert read_config(cfg).loss == losses.build_loss("density")
    fields = method_fields(cfg.method, "SEQ_CLS", total_steps=1000)
    config: Any = petl.build_config(**fields)
    assert (config.inner, config.bits) == (inner, 1)
    alone: Any = petl.build_config(
        **method_fields({"name": inner, **preset_of(inner)}, "SEQ_CLS", total_steps=1000)
    )
    recipe = petl.method("binary").variant({"inner": inner}).inner_defaults
    for name in set(preset_of(inner)) - {"name"}:
        assert getattr(config, name) == recipe.get(name, getattr(alone, name)), name
