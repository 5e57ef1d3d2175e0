"""LoRA is bit-exact PEFT's; petl's additions to it."""

import json
import math
import subprocess

import peft
import pytest
import torch
import warm_python
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import petl
from petl import testing
from petl.testing import Case

TARGETS = ["q_proj", "v_proj", "down_proj"]
BATCH = testing.TINY_MODELS["llama"].batch()

VARIANTS = [
    {},
    {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1},
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    {"bias": "all"},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": False},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    {"layers_to_transform": [1]},
    {"modules_to_save": ["lm_head"]},
    {"task_type": "CAUSAL_LM"},
    {"target_modules": r".*\.(up|down)_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    {"trainable_token_indices": [3, 4]},
]


def assert_same_model(ours: PeftModel, theirs: PeftModel) -> None:
    """Assert equal classes, names, values (bit-exact), trainable tensors, config and logits."""
    assert isinstance(ours, type(theirs))  # saving writes the fingerprint of the base as well
    kinds = [{n: type(m) for n, m in model.named_modules() if n} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert not [name for name in state if not torch.equal(state[name], expected[name])]
    assert set(testing.trainable(ours)) == set(testing.trainable(theirs))
    configs = [model.active_peft_config.to_dict() for model in (ours, theirs)]
    assert configs[0] == configs[1]
    assert torch.equal(testing.logits(ours, BATCH), testing.logits(theirs, BATCH))


@pytest.mark.cells(7)
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_wrapped_model_equals_pefts(fields):
    fields = {"target_modules": TARGETS, **fields}
    torch.manual_seed(1)
    ours = petl.wrap(testing.tiny_llama(), "lora", **fields)
    torch.manual_seed(1)
    theirs = get_peft_model(testing.tiny_llama(), LoraConfig(**fields))
    assert_same_model(ours, theirs)


@pytest.mark.parametrize(("name", "fields"), [("dora", "use_dora"), ("rslora", "use_rslora")])
def test_named_settings_of_lora_equal_pefts(name, fields):
    torch.manual_seed(1)
    ours = petl.wrap(testing.tiny_llama(), name, target_modules=TARGETS)
    torch.manual_seed(1)
    config = LoraConfig(target_modules=TARGETS, **{fields: True})
    assert_same_model(ours, get_peft_model(testing.tiny_llama(), config))


def test_every_field_of_peft_is_passed_through():
    config = petl.build_config("lora", r=4, target_modules=TARGETS, layer_replication=[(0, 2)])
    assert type(config) is LoraConfig
    assert config.layer_replication == [(0, 2)]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_are_those_of_the_dense_weight(use_rslora):
    r, alpha = 4, 10
    fields = {"r": r, "lora_alpha": alpha, "use_rslora": use_rslora, "target_modules": TARGETS}
    case = Case("lora", "llama", fields)
    model = case.wrap_stirred()
    scale = alpha / math.sqrt(r) if use_rslora else alpha / r
    dense = case.base()
    for key, layer in testing.tuner_layers(model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            dense.get_submodule(key.removeprefix("base_model.model.")).weight += scale * B @ A
    expected = testing.logits(dense, BATCH)
    assert testing.difference(testing.logits(model, BATCH), expected) < 2e-5
    merged = model.merge_and_unload()
    assert testing.difference(testing.logits(merged, BATCH), expected) < 2e-5


def test_the_default_initialization_gives_bit_exact_base_outputs():
    model = petl.wrap(testing.tiny_llama(), "lora", target_modules=TARGETS)
    expected = testing.logits(testing.tiny_llama(), BATCH)
    assert torch.equal(testing.logits(model, BATCH), expected)
    for layer in testing.tuner_layers(model).values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert float(A.abs().max()) <= 1 / math.sqrt(layer.in_features)
        assert torch.count_nonzero(B) == 0


# Counts


def llama_2_7b() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(intermediate_size=11008, num_key_value_heads=32))


def roberta_base() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50265))


def vit_b16() -> nn.Module:
    return ViTForImageClassification(ViTConfig())


SEVEN = "block-linear"
COUNTS = [
    (llama_2_7b, {"target_modules": ["q_proj", "v_proj"], "r": 8}, 4_194_304),
    (llama_2_7b, {"target_modules": SEVEN, "r": 8}, 19_988_480),
    (llama_2_7b, {"target_modules": SEVEN, "r": 64}, 159_907_840),
    (llama_2_7b, {"target_modules": SEVEN, "r": 64, "use_dora": True}, 161_267_712),
    (roberta_base, {"target_modules": "query-value", "r": 8}, 294_912),
    (vit_b16, {"target_modules": "query-value", "r": 8}, 294_912),
]


@pytest.mark.parametrize(
    ("build", "fields", "count"),
    [*COUNTS[:1], *(pytest.param(*row, marks=pytest.mark.thorough) for row in COUNTS[1:])],
)
def test_trainable_parameters_are_the_published_number(build, fields, count):
    with torch.device("meta"):
        model = petl.wrap(build(), "lora", **fields)
    assert sum(p.numel() for p in testing.trainable(model).values()) == count


# Files


def test_files_are_interchangeable_with_pefts(tmp_path):
    case = Case("lora", "bert", {"target_modules": ["query", "value"]})
    ours = case.wrap_stirred()
    ours.save_pretrained(tmp_path / "ours")
    theirs = get_peft_model(case.base(), LoraConfig(**case.all_fields()))
    theirs.save_pretrained(tmp_path / "theirs")
    keys, config_keys = [], []
    for name in ("ours", "theirs"):
        keys.append(set(load_file(tmp_path / name / "adapter_model.safetensors")))
        config_keys.append(set(json.loads((tmp_path / name / "adapter_config.json").read_text())))
    assert keys[0] == keys[1]
    assert config_keys[0] == config_keys[1]
    again = PeftModel.from_pretrained(case.base(), tmp_path / "ours")
    expected = testing.logits(ours, case.batch())
    assert torch.equal(testing.logits(again, case.batch()), expected)
    expected = testing.logits(theirs, case.batch())
    again = petl.load(case.base(), tmp_path / "theirs")
    assert torch.equal(testing.logits(again, case.batch()), expected)


STOCK = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM

torch.set_num_threads(1)
base, adapter, inputs, out = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, out)
assert "petl" not in sys.modules
"""


def test_an_adapter_loads_in_a_process_without_petl(tmp_path):
    base = testing.tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = testing.stir(petl.wrap(base, "lora", target_modules=TARGETS))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(BATCH, tmp_path / "inputs")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "inputs", "out")]
    subprocess.run([warm_python.python(), "-c", STOCK, *paths], check=True, timeout=280)
    found = torch.load(tmp_path / "out")
    assert testing.difference(found, testing.logits(model, BATCH)) <= 1e-6


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initializations_that_modify_the_base_are_recognized(start):
    from petl.core.spec.facts import modifies_base_weights

    assert modifies_base_weights(petl.build_config("lora", init_lora_weights=start))
    assert not modifies_base_weights(petl.build_config("lora"))
    base = testing.tiny_llama()
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    model = petl.wrap(base, "lora", target_modules=["q_proj"], init_lora_weights=start)
    layer = next(iter(testing.tuner_layers(model).values()))
    assert not torch.equal(layer.base_layer.weight, before)


# Initialization from data


def calibration() -> list:
    return [testing.TINY_MODELS["llama"].batch(rows=8, seed=seed) for seed in range(6)]


@pytest.mark.parametrize("name", ["default", "task"])
def test_eva_initializes_from_orthogonal_directions_of_the_inputs(name):
    base = testing.tiny_llama()
    fields = {"target_modules": ["q_proj"], "init_lora_weights": "eva", "r": 4}
    model = petl.wrap(base, "lora", calibration=calibration(), adapter_name=name, **fields)
    expected = testing.logits(testing.tiny_llama(), BATCH)
    assert testing.difference(testing.logits(model, BATCH), expected) <= 1e-6
    for layer in testing.tuner_layers(model).values():
        A = layer.lora_A[name].weight
        gram = A @ A.T
        assert testing.difference(gram, torch.diag(gram.diagonal())) < 1e-4
        assert float(gram.diagonal().min()) > 0
        assert float(A.abs().max()) > 1 / math.sqrt(
            layer.in_features
        )  # larger than the default initialization


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of PEFT's own hooks
def test_lora_ga_initializes_from_gradients_and_keeps_the_outputs():
    fields = {"target_modules": ["q_proj"], "init_lora_weights": "lora_ga", "r": 4}
    model = petl.wrap(testing.tiny_llama(), "lora", calibration=calibration(), **fields)
    expected = testing.logits(testing.tiny_llama(), BATCH)
    assert testing.difference(testing.logits(model, BATCH), expected) <= 1e-4
    for layer in testing.tuner_layers(model).values():
        assert torch.count_nonzero(layer.lora_B["default"].weight) > 0
    assert not any(p.grad is not None for p in model.parameters())


# Errors


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of PEFT's own hooks
def test_lora_ga_takes_all_linear_layers():
    fields = {"target_modules": "all-linear", "init_lora_weights": "lora_ga", "r": 4}
    model = petl.wrap(testing.tiny_llama(), "lora", calibration=calibration(), **fields)
    layers = testing.tuner_layers(model)
    assert {name.rpartition(".")[2] for name in layers} >= {"q_proj", "o_proj", "down_proj"}
    assert all(layer.lora_B["default"].weight.any() for layer in layers.values())


# Optimizers


LOW_RANK = [name for name in ("lora", "mola", "increlora") if name in petl.list_methods()]


@pytest.mark.parametrize("name", LOW_RANK)
def test_loraplus_sets_the_learning_rate_of_every_b_and_covers_all_parameters(name):
    fields = {"target_modules": ["query", "value"]} if name == "lora" else {}
    model = Case(name, "bert", fields).without_head().wrap()
    optimizer = petl.loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
    )
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = testing.trainable(model)
    assert len(rates) == len(trainable)
    assert any("lora_B" in n for n in trainable)
    for parameter_name, parameter in trainable.items():
        expected = 8e-3 if "lora_B" in parameter_name else 1e-3
        assert rates[id(parameter)] == pytest.approx(expected), parameter_name


def test_loraplus_puts_vectors_into_bs_group_as_peft_does():
    """The bias of a head has B's learning rate, by PEFT's rule."""
    model = Case("lora", "bert", {"target_modules": ["query"]}).wrap()
    optimizer = petl.loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert rates[id(head.weight)] == pytest.approx(1e-3)
    assert rates[id(head.bias)] == pytest.approx(8e-3)


def test_lorafa_trains_b_only():
    model = Case("lora", "llama", {"target_modules": ["q_proj"], "r": 4}).wrap()
    optimizer = petl.lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        model.train()(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_B" in name for name in changed)


def test_lora_is_not_reimplemented():
    assert petl.get("lora") is peft.LoraConfig
    assert not petl.method("lora").own
